"""What each op promises by itself: known values, limits, masks, messages."""

import math
import re
import warnings

import pytest
import torch

import pywm
from pywm.distributions import Categorical, DiagGaussian, MultiCategorical
from pywm.ops import _native

NAN = float("nan")


def column(*values):
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


# The vector of the specification: index 2 is truncated, index 4 terminated.
REWARD, VALUE = column(1, 0, -1, 2, 0.5, 1), column(0.5, 0.2, -0.3, 1, 0.4, 0.1)
NEXT_VALUE = column(0.2, -0.3, 0.7, 0.4, 0, 0.9)
TERMINATED, TRUNCATED = column(0, 0, 0, 0, 1, 0) != 0, column(0, 0, 1, 0, 0, 0) != 0
ADVANTAGE = column(0.22438, -0.503584, -0.007, 1.49005, 0.1, 1.791)


class TestGAE:
    def test_known_vector(self):
        advantage, returns = pywm.gae(REWARD, VALUE, NEXT_VALUE, TERMINATED, TRUNCATED)
        torch.testing.assert_close(advantage, ADVANTAGE, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(returns, advantage + VALUE)

    def test_truncation_is_not_termination(self):
        wrong = pywm.gae(REWARD, VALUE, NEXT_VALUE, TERMINATED | TRUNCATED, TRUNCATED).advantage
        torch.testing.assert_close(
            wrong, column(-0.388607, -1.15535, -0.7, 1.49005, 0.1, 1.791), rtol=2e-5, atol=2e-6
        )

    def test_float_masks_equal_bool_masks(self):
        a = pywm.gae(REWARD, VALUE, NEXT_VALUE, TERMINATED, TRUNCATED)
        b = pywm.gae(REWARD, VALUE, NEXT_VALUE, TERMINATED * 0.5, TRUNCATED.to(torch.float32) * -3)
        torch.testing.assert_close(a.advantage, b.advantage, rtol=0, atol=0)

    def test_lam_1_is_monte_carlo_and_lam_0_is_one_step(self):
        none = torch.zeros(6, 1, dtype=torch.bool)
        next_value = torch.cat([VALUE[1:], torch.zeros(1, 1)])
        total = REWARD.flip(0).cumsum(0).flip(0)
        monte_carlo = pywm.gae(REWARD, VALUE, next_value, none, none, discount=1.0, lam=1.0).advantage
        torch.testing.assert_close(monte_carlo, total - VALUE)
        one_step = pywm.gae(REWARD, VALUE, next_value, none, none, discount=0.9, lam=0.0).advantage
        torch.testing.assert_close(one_step, REWARD + 0.9 * next_value - VALUE)

    @pytest.mark.parametrize("N", [1, 3, 40])
    def test_next_value_is_ignored_where_terminated(self, N):
        next_value = NEXT_VALUE.masked_fill(TERMINATED, NAN).expand(6, N).clone().requires_grad_()
        full = [x.expand(6, N) for x in (REWARD, VALUE, TERMINATED, TRUNCATED)]
        advantage, returns = pywm.gae(full[0], full[1], next_value, full[2], full[3])
        torch.testing.assert_close(advantage, ADVANTAGE.expand(6, N), rtol=2e-5, atol=2e-6)
        (grad,) = torch.autograd.grad(returns.sum(), next_value)
        assert grad.isfinite().all()
        assert (grad[4] == 0).all()

    @pytest.mark.parametrize("N", [1, 3, 40])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_invalid_rows_may_hold_anything(self, N, dtype):
        """A reset row after the truncation changes nothing in the other rows, and no NaN leaves it."""
        where = 3  # directly after the truncated row
        bad = torch.full((1, 1), NAN, dtype=torch.float64)

        def insert(x, y):
            return torch.cat([x[:where], y, x[where:]]).expand(7, N).to(dtype).clone()

        flags = [
            torch.cat([x[:where], torch.zeros(1, 1, dtype=torch.bool), x[where:]]).expand(7, N)
            for x in (TERMINATED, TRUNCATED)
        ]
        valid = torch.ones(7, N, dtype=torch.bool)
        valid[where] = False
        reward, next_value = insert(REWARD, bad).requires_grad_(), insert(NEXT_VALUE, bad).requires_grad_()
        value = insert(VALUE, column(7.0)).requires_grad_()
        advantage, returns = pywm.gae(reward, value, next_value, *flags, valid=valid)
        keep = [0, 1, 2, 4, 5, 6]
        torch.testing.assert_close(advantage[keep].double(), ADVANTAGE.expand(6, N), rtol=2e-5, atol=2e-6)
        assert (advantage[where] == 0).all()
        assert (returns[where] == 7).all()
        grads = torch.autograd.grad(advantage.sum() + returns.sum(), (reward, value, next_value))
        for grad in grads:
            assert (grad[where] == 0).all()
            assert grad.isfinite().all()

    def test_nan_stays_in_its_own_episode(self):
        reward = REWARD.clone()
        reward[5] = NAN
        for N in (1, 40):
            full = [x.expand(6, N) for x in (reward, VALUE, NEXT_VALUE, TERMINATED, TRUNCATED)]
            advantage = pywm.gae(*full).advantage
            assert advantage[:5].isfinite().all()
            assert advantage[5].isnan().all()


class TestLambdaReturn:
    def test_by_hand(self):
        # R1 = 2 + 0.5·4 = 4;  R0 = 1 + 0.5·(0.5·3 + 0.5·4) = 2.75
        returns = pywm.lambda_return(column(1, 2), column(0.5, 0.5), column(3, 4), 0.5)
        torch.testing.assert_close(returns, column(2.75, 4))

    def test_termination_cuts_the_future(self):
        returns = pywm.lambda_return(
            torch.ones(3, 1), torch.tensor([[1.0], [0], [1]]), torch.full((3, 1), 9.0), 1.0
        )
        assert returns[:, 0].tolist() == [2.0, 1.0, 10.0]

    def test_equals_gae_plus_value_inside_an_episode(self):
        g = torch.Generator().manual_seed(0)
        reward, value = torch.randn(2, 9, 5, generator=g, dtype=torch.float64)
        next_value = torch.cat([value[1:], torch.randn(1, 5, generator=g, dtype=torch.float64)])
        none = torch.zeros(9, 5, dtype=torch.bool)
        returns = pywm.lambda_return(reward, torch.full_like(reward, 0.9), next_value, 0.8)
        torch.testing.assert_close(
            returns, pywm.gae(reward, value, next_value, none, none, discount=0.9, lam=0.8).returns
        )

    def test_row_before_an_invalid_one_bootstraps_and_nan_behind_the_mask_is_harmless(self):
        valid = torch.tensor([[1], [0], [1]]).bool()
        inputs = [column(1, NAN, 2), column(0.5, NAN, 0.5), column(3, NAN, 4)]
        inputs = [x.requires_grad_() for x in inputs]
        returns = pywm.lambda_return(*inputs, 0.9, valid=valid)
        torch.testing.assert_close(returns, column(1 + 0.5 * 3, 0, 2 + 0.5 * 4))
        for grad in torch.autograd.grad(returns.sum(), inputs):
            assert grad.isfinite().all()
            assert grad[1] == 0

    def test_lam_tensor_is_not_differentiated(self):
        lam = torch.full((2, 1), 0.5, dtype=torch.float64, requires_grad=True)
        reward = column(1, 2).requires_grad_()
        returns = pywm.lambda_return(reward, column(0.5, 0.5), column(3, 4), lam)
        returns.sum().backward()
        assert lam.grad is None


def test_discounted_return_by_hand():
    returns = pywm.discounted_return(
        column(1, 2, 3), column(0.5, 0, 1), torch.tensor([10.0], dtype=torch.float64)
    )
    assert returns[:, 0].tolist() == [2.0, 2.0, 13.0]


class TestVTrace:
    def test_on_policy_equals_the_td_lambda_return(self):
        g = torch.Generator().manual_seed(0)
        reward, value = torch.randn(2, 9, 5, generator=g, dtype=torch.float64)
        next_value = torch.cat([value[1:], torch.randn(1, 5, generator=g, dtype=torch.float64)])
        discount, none = torch.full_like(reward, 0.9), torch.zeros(9, 5, dtype=torch.bool)
        target, _ = pywm.vtrace(torch.zeros_like(reward), reward, discount, value, next_value, none, lam=0.8)
        torch.testing.assert_close(target, pywm.lambda_return(reward, discount, next_value, 0.8))

    def test_truncation_keeps_the_bootstrap_and_cuts_the_trace(self):
        zeros = column(0, 0)
        cut = torch.tensor([[True], [False]])
        target, advantage = pywm.vtrace(zeros, column(1, 5), column(0.5, 0.5), zeros, column(2, 4), cut)
        torch.testing.assert_close(target, column(1 + 0.5 * 2, 5 + 0.5 * 4))
        torch.testing.assert_close(advantage, target)


class TestPPOLoss:
    def frozen(self, M=6):
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(M, 3, generator=g, dtype=torch.float64)
        dist = Categorical(logits)
        action = dist.sample(g)
        advantage, value, returns = torch.randn(3, M, generator=g, dtype=torch.float64)
        return dist, action, dist.log_prob(action), advantage, value, returns

    def test_unchanged_policy(self):
        """With ratio 1 the loss is minus the mean advantage, nothing is clipped, the KL is 0."""
        dist, action, log_prob, advantage, value, returns = self.frozen()
        loss, stats = pywm.ppo_loss(
            dist, action, log_prob, advantage, value, returns, normalize_advantage=False, value_coef=0.0
        )
        torch.testing.assert_close(loss, -advantage.mean())
        assert stats.clip_fraction == 0
        assert abs(stats.approx_kl) < 1e-12
        torch.testing.assert_close(stats.value_loss, 0.5 * (value - returns).square().mean())
        torch.testing.assert_close(stats.entropy, dist.entropy().mean())
        assert all(x.ndim == 0 and not x.requires_grad for x in stats)

    def test_normalisation_is_skipped_for_fewer_than_two_valid_rows(self):
        dist, action, log_prob, advantage, value, returns = self.frozen()
        valid = torch.tensor([False, True, False, False, False, False])
        loss, _ = pywm.ppo_loss(
            dist, action, log_prob, advantage, value, returns, valid=valid, value_coef=0.0
        )
        torch.testing.assert_close(loss, -advantage[1])

    def test_no_valid_row_gives_zero(self):
        dist, action, log_prob, advantage, value, returns = self.frozen()
        loss, _ = pywm.ppo_loss(
            dist, action, log_prob, advantage, value, returns, valid=torch.zeros(6, dtype=torch.bool)
        )
        assert loss == 0

    @pytest.mark.parametrize("family", ["categorical", "multi", "gaussian"])
    def test_invalid_rows_count_nowhere_and_may_hold_nan(self, family):
        g = torch.Generator().manual_seed(1)
        if family == "gaussian":
            dist = DiagGaussian(torch.randn(5, 2, generator=g), torch.zeros(2))
            bad = DiagGaussian(torch.cat([dist.mean, torch.full((1, 2), NAN)]).requires_grad_(), dist.log_std)
            action = torch.randn(5, 2, generator=g)
            filler, parameters = torch.full((1, 2), NAN), bad.mean
        else:
            nvec = (3,) if family == "categorical" else (2, 4)
            logits = torch.randn(5, sum(nvec), generator=g)
            more = torch.cat([logits, torch.full((1, sum(nvec)), NAN)]).requires_grad_()
            parameters = more
            if family == "categorical":
                dist, bad = Categorical(logits), Categorical(more)
                filler = torch.tensor([99])
            else:
                dist, bad = MultiCategorical(logits, nvec), MultiCategorical(more, nvec)
                filler = torch.tensor([[99, -5]])
            action = dist.sample(g)
        rows = torch.randn(4, 5, generator=g)
        padded = torch.cat([rows, torch.full((4, 1), NAN)], 1)
        value = padded[2].clone().requires_grad_()
        valid = torch.tensor([True] * 5 + [False])
        want = pywm.ppo_loss(dist, action, *rows, entropy_coef=0.1)
        loss, stats = pywm.ppo_loss(
            bad,
            torch.cat([action, filler]),
            padded[0],
            padded[1],
            value,
            padded[3],
            entropy_coef=0.1,
            valid=valid,
        )
        torch.testing.assert_close(loss.detach(), want.loss)
        for a, b in zip(stats, want.stats, strict=True):
            torch.testing.assert_close(a, b)
        for grad in torch.autograd.grad(loss, (parameters, value)):
            assert grad.isfinite().all()
            assert (grad[5] == 0).all()

    def test_forbidden_class_has_no_weight(self):
        logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
        one = torch.ones(1)
        loss, stats = pywm.ppo_loss(
            Categorical(logits), torch.tensor([0]), -one, one, one, one, entropy_coef=0.1
        )
        (grad,) = torch.autograd.grad(loss, logits)
        assert grad.isfinite().all()
        assert grad[0, 1] == 0
        torch.testing.assert_close(stats.entropy, Categorical(torch.tensor([0.0, 1.0])).entropy())

    @pytest.mark.parametrize("nvec", [(2,) * 40, (1500, 3)], ids=["many groups", "wide group"])
    @pytest.mark.parametrize("grad", [True, False])
    def test_more_groups_or_classes_than_the_kernel_keeps(self, nvec, grad):
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(3, sum(nvec), generator=g, dtype=torch.float64, requires_grad=grad)
        dist = MultiCategorical(logits, nvec)
        action = dist.sample(g)
        rows = torch.randn(4, 3, generator=g, dtype=torch.float64)
        got = pywm.ppo_loss(dist, action, *rows, entropy_coef=0.1)
        with _native.disabled():
            want = pywm.ppo_loss(dist, action, *rows, entropy_coef=0.1)
        for a, b in zip((got.loss, *got.stats), (want.loss, *want.stats), strict=True):
            torch.testing.assert_close(a, b)
        if grad:
            torch.testing.assert_close(
                torch.autograd.grad(got.loss, logits), torch.autograd.grad(want.loss, logits)
            )

    def test_integer_actions_of_any_width(self):
        dist, action, log_prob, advantage, value, returns = self.frozen()
        a = pywm.ppo_loss(dist, action, log_prob, advantage, value, returns).loss
        b = pywm.ppo_loss(dist, action.to(torch.int32), log_prob, advantage, value, returns).loss
        assert a == b

    @pytest.mark.parametrize("bad", [-1, 3, 2**62])
    def test_action_that_is_no_class(self, bad):
        dist, action, *rest = self.frozen()
        action[4] = bad
        with pytest.raises(
            ValueError, match=rf"ppo_loss: action is {bad} in row 4, but 0 <= action < 3 was expected"
        ):
            pywm.ppo_loss(dist, action, *rest)
        with (
            _native.disabled(),
            pytest.raises(
                ValueError, match=rf"ppo_loss: action is {bad} in row 4, but 0 <= action < 3 was expected"
            ),
        ):
            pywm.ppo_loss(dist, action, *rest)

    def test_action_that_is_no_class_of_its_group(self):
        """More groups than the kernel takes: the reference serves."""
        rows = torch.zeros(5)
        action = torch.zeros(5, 200, dtype=torch.int64)
        action[3, 150] = 2
        dist = MultiCategorical(torch.zeros(5, 400), (2,) * 200)
        with pytest.raises(ValueError, match=r"action is 2 in row 3, but 0 <= action < 2 was expected"):
            pywm.ppo_loss(dist, action, rows, rows, rows, rows)
        valid = torch.tensor([True, True, True, False, True])
        assert pywm.ppo_loss(dist, action, rows, rows, rows, rows, valid=valid).loss.isfinite()

    def test_value_clip_needs_old_value(self):
        with pytest.raises(ValueError, match=r"old_value is None, but value_clip needs it"):
            pywm.ppo_loss(*self.frozen(), value_clip=0.2)


class TestMessages:
    """Every bad call names the function, the argument, what came and what was expected."""

    x = torch.zeros(4, 2)
    mask = torch.zeros(4, 2, dtype=torch.bool)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"value": torch.zeros(4, 3)}, ValueError, r"gae: value is \(4, 3\), but \(4, 2\) was expected"),
            ({"value": torch.zeros(2, 4)}, ValueError, r"looks transposed: pywm is time-major"),
            ({"reward": torch.zeros(4)}, ValueError, r"gae: reward is \(4,\), but \[T, N\] with T >= 1"),
            ({"reward": torch.zeros(0, 2)}, ValueError, r"gae: reward is \(0, 2\)"),
            (
                {"value": torch.zeros(4, 2, dtype=torch.float64)},
                TypeError,
                r"value is torch.float64, but reward is torch.float32",
            ),
            (
                {"reward": torch.zeros(4, 2, dtype=torch.int64)},
                TypeError,
                r"gae: reward is torch.int64, but one of float32",
            ),
            (
                {"reward": torch.zeros(4, 2, dtype=torch.complex64)},
                TypeError,
                r"gae: reward is torch.complex64",
            ),
            (
                {"terminated": torch.zeros(4, 2, dtype=torch.int64)},
                TypeError,
                r"gae: terminated is torch.int64, but one of bool",
            ),
            ({"next_value": [1.0]}, TypeError, r"gae: next_value is a list, but a torch.Tensor was expected"),
            ({"reward": torch.zeros(4, 2).to_sparse()}, TypeError, r"gae: reward is torch.sparse_coo"),
            ({"reward": torch.zeros(4, 2, device="meta")}, TypeError, r"gae: reward is on the meta device"),
            ({"valid": torch.zeros(4)}, ValueError, r"gae: valid is \(4,\)"),
            ({"discount": 1.5}, ValueError, r"gae: discount is 1.5, but a number in \[0, 1\] was expected"),
            ({"lam": NAN}, ValueError, r"gae: lam is nan"),
            ({"lam": "0.9"}, TypeError, r"gae: lam is a str, but a number was expected"),
            ({"lam": True}, TypeError, r"gae: lam is a bool"),
        ],
        ids=lambda x: x if isinstance(x, str) else None,
    )
    @pytest.mark.parametrize("path", ["eager", "reference", "gradients"])
    def test_gae(self, change, error, message, path):
        arguments = {
            "reward": self.x,
            "value": self.x,
            "next_value": self.x,
            "terminated": self.mask,
            "truncated": self.mask,
        }
        arguments.update(change)
        if path == "gradients" and "value" not in change:
            arguments["value"] = self.x.clone().requires_grad_()
        if path == "reference":
            with _native.disabled(), pytest.raises(error, match=message):
                pywm.gae(**arguments)
        else:
            with pytest.raises(error, match=message):
                pywm.gae(**arguments)

    def test_compiled_call_gives_the_same_message(self):
        compiled = torch.compile(pywm.gae, backend="eager")
        with pytest.raises(Exception, match=re.escape("gae: value is (4, 3), but (4, 2) was expected")):
            compiled(self.x, torch.zeros(4, 3), self.x, self.mask, self.mask)

    def test_ppo_loss(self):
        x = torch.zeros(4)
        with pytest.raises(TypeError, match=r"ppo_loss: dist is a Tensor, but Categorical"):
            pywm.ppo_loss(x, x, x, x, x, x)
        with pytest.raises(
            ValueError, match=r"ppo_loss: action is \(3,\), but \(4,\) was expected, as dist.logits"
        ):
            pywm.ppo_loss(Categorical(torch.zeros(4, 2)), torch.zeros(3, dtype=torch.long), x, x, x, x)
        with pytest.raises(TypeError, match=r"ppo_loss: action is torch.float32"):
            pywm.ppo_loss(Categorical(torch.zeros(4, 2)), x, x, x, x, x)
        with pytest.raises(ValueError, match=r"ppo_loss: dist.nvec is \(2, 3\)"):
            pywm.ppo_loss(
                MultiCategorical(torch.zeros(4, 4), (2, 3)), torch.zeros(4, 2, dtype=torch.long), x, x, x, x
            )
        with pytest.raises(ValueError, match=r"ppo_loss: clip is 0"):
            pywm.ppo_loss(
                Categorical(torch.zeros(4, 2)), torch.zeros(4, dtype=torch.long), x, x, x, x, clip=0
            )


class TestBackend:
    def test_says_which_and_why(self):
        told = pywm.backend(torch.zeros(1))
        assert told.name == "cpu"
        assert "compiled kernels" in told.why
        assert set(pywm.backend()) == {"cpu", "cuda"}
        assert "bfloat16" in str(pywm.backend(torch.zeros(1, dtype=torch.bfloat16)))
        assert pywm.backend(torch.zeros(1, dtype=torch.int64)).name == "none"
        with pytest.raises(TypeError, match="backend: x is a int"):
            pywm.backend(3)

    def test_disabled_runs_the_reference(self):
        x, mask = torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.bool)
        before = _native.calls()
        with _native.disabled():
            assert pywm.backend(x).name == "reference"
            pywm.gae(x, x, x, mask, mask)
        assert _native.calls() == before


@pytest.mark.parametrize("position", range(3))
def test_tensors_without_data_are_named(position):
    names = ("reward", "value", "next_value")
    tensors = [torch.zeros(3, 2) for _ in names]
    masks = [torch.zeros(3, 2, dtype=torch.bool)] * 2
    tensors[position] = torch.nn.parameter.UninitializedParameter()
    message = f"gae: {names[position]} is an UninitializedParameter, but data was expected"
    with pytest.raises(TypeError, match=message):
        pywm.gae(*tensors, *masks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors[position] = torch.masked.masked_tensor(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=f"gae: {names[position]} is a MaskedTensor, but a dense"):
        pywm.gae(*tensors, *masks)


def test_an_old_value_that_nobody_needs_is_looked_at_all_the_same():
    dist = pywm.distributions.Categorical(torch.zeros(4, 2))
    action, row = torch.zeros(4, dtype=torch.long), torch.zeros(4)
    pywm.ppo_loss(dist, action, row, row, row, row, old_value=row)
    with pytest.raises(TypeError, match="ppo_loss: old_value is a str"):
        pywm.ppo_loss(dist, action, row, row, row, row, old_value="abc")
    with pytest.raises(ValueError, match=r"ppo_loss: old_value is \(3,\), but \(4,\) was expected"):
        pywm.ppo_loss(dist, action, row, row, row, row, old_value=row[1:])


@pytest.mark.parametrize("name", ["value_coef", "entropy_coef"])
def test_coefficients_are_finite(name):
    dist = pywm.distributions.Categorical(torch.zeros(4, 2))
    action, row = torch.zeros(4, dtype=torch.long), torch.zeros(4)
    with pytest.raises(
        ValueError, match=rf"ppo_loss: {name} is inf, but a number in \[0, inf\) was expected"
    ):
        pywm.ppo_loss(dist, action, row, row, row, row, **{name: float("inf")})
