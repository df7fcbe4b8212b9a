"""An independent implementation agrees: TorchRL's DreamerV3 modules with our weights, under the same samples.

What differs is mapped here: TorchRL keeps a block's weight ``[in, out]``, works batch-major, must be told to have norms in
its posterior and to mix in the uniform distribution, and computes its norms in float32 whatever the dtype. With those norms
it agrees to float32's precision; with the same formula in double in their place, to double's. Bounded actions, eps, the
order of inputs and gates, the update gate's offset, resets, the inverse CDF and straight-through gradients are the same.
"""

import pytest
import torch

from pywm.models import RSSM, RSSMConfig, RSSMState
from pywm.ops import Layer, Policy, _native

INSTALL = "compares with TorchRL: pip install torchrl==0.14.1"
base = pytest.importorskip("torchrl.modules.models.model_based", reason=INSTALL, exc_type=ImportError)
if not hasattr(base, "RSSMRolloutV3"):
    pytest.skip(INSTALL, allow_module_level=True)

from tensordict import TensorDict  # noqa: E402
from tensordict.nn import TensorDictModule  # noqa: E402

T, N = 6, 3
CONFIG = RSSMConfig(deter=24, hidden=18, stoch=3, classes=5, embed=7, action=2, blocks=4)


def random(*shape, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def uniforms(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture
def model():
    model = RSSM(CONFIG, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):  # biases and scales that differ, so that a mix-up shows
            p.add_(0.2 * random(*p.shape, seed=i))
    return model


@pytest.fixture
def theirs(model):
    """TorchRL's prior and posterior with the model's weights."""
    c = CONFIG
    sizes = {"hidden_dim": c.hidden, "num_categoricals": c.stoch, "num_classes": c.classes}
    prior = base.RSSMPriorV3(
        action_shape=(c.action,),
        action_dim=c.action,
        rnn_hidden_dim=c.deter,
        recurrent_model="block_gru",
        num_blocks=c.blocks,
        prior_num_layers=c.prior_layers,
        norm_eps=c.eps,
        unimix=c.unimix,
        **sizes,
    ).double()
    posterior = base.RSSMPosteriorV3(
        rnn_hidden_dim=c.deter,
        obs_embed_dim=c.embed,
        use_rms_norm=True,
        norm_eps=c.eps,
        unimix=c.unimix,
        **sizes,
    ).double()
    ours = dict(model.named_parameters())
    pairs = pairing(prior, posterior)
    assert set(pairs) == set(ours)
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(like_theirs(ours[name]))
    return prior, posterior


def pairing(prior, posterior):
    """Our names of their parameters, every one of which must have one."""
    found = {}

    def add(name, linear, norm=None):
        found[f"{name}.weight"], found[f"{name}.bias"] = linear.weight, linear.bias
        if norm is not None:
            found[f"{name}.scale"] = norm.weight

    rnn = prior.rnn
    add("deter_in", *rnn.belief_projection[:2])
    add("stoch_in", *rnn.state_projection[:2])
    add("action_in", *rnn.action_projection[:2])
    add("hidden", *rnn.hidden_layers[:2])
    add("gates", rnn.gates)
    for name, layers in (
        ("prior", prior.rnn_to_prior_projector),
        ("posterior", posterior.obs_rnn_to_post_projector),
    ):
        for i in range(0, len(layers), 3):
            add(f"{name}.{i // 3}", *layers[i : i + 2])
    both = [*prior.parameters(), *posterior.parameters()]
    assert {id(x) for x in both} == {id(x) for x in found.values()}
    return found


def like_theirs(x):
    """A block's weight the other way round; the rest as it is."""
    return x.mT if x.ndim == 3 else x


def norm_in_double(value, weight, eps):
    return torch.nn.functional.rms_norm(value, (len(weight),), weight, eps)


@pytest.fixture(params=["as they are", "in double"])
def tolerance(request, monkeypatch):
    """Of results, for TorchRL's norms as they are and for the same formula without the cast to float32."""
    if request.param == "as they are":
        return 1e-4
    monkeypatch.setattr(base, "_dreamer_v3_rms_norm", norm_in_double)
    return 1e-10


def assert_near(got, want, tolerance):
    assert got.shape == want.shape
    assert ((got - want).abs().max() / want.abs().max().clamp(min=1e-3)).item() < tolerance


def roll_out(prior, posterior, embed, action, is_first, deter, stoch, uniform, monkeypatch):
    """RSSMRolloutV3, whose random numbers are those given: deter, stoch, posterior and prior, time-major."""
    rollout = base.RSSMRolloutV3(
        TensorDictModule(
            prior,
            in_keys=["state", "belief", "action"],
            out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")],
        ),
        TensorDictModule(
            posterior,
            in_keys=[("next", "belief"), ("next", "encoded_latents")],
            out_keys=[("next", "posterior_logits"), ("next", "state")],
        ),
    )
    window = {
        "state": stoch.flatten(1).unsqueeze(1).expand(-1, T, -1),  # it takes the first row
        "belief": deter.unsqueeze(1).expand(-1, T, -1),
        "action": action.transpose(0, 1),
        "is_init": is_first.t().unsqueeze(-1),
        "next": {"encoded_latents": embed.transpose(0, 1)},
    }

    def rand(*shape, device):
        assert shape == (
            T,
            2,
            N,
            CONFIG.stoch,
        )  # for the prior's samples, which nobody uses, and the posterior's
        return torch.stack([uniform, uniform], 1)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        after = rollout(TensorDict(window, [N, T])).get("next")
    names = ("belief", "state", "posterior_logits", "prior_logits")
    deter, stoch, *logits = (after.get(name).transpose(0, 1) for name in names)
    return deter, stoch.unflatten(-1, (CONFIG.stoch, CONFIG.classes)), *logits


def test_windows_and_their_gradients_agree(model, theirs, tolerance, monkeypatch):
    c = CONFIG
    is_first = torch.zeros(T, N, dtype=torch.bool)
    is_first[0, 1] = is_first[3, 0] = is_first[4] = True
    values = {
        "embed": random(T, N, c.embed, seed=100),
        "action": 1.5 * random(T, N, c.action, seed=101),  # some beyond the bound
        "deter": random(N, c.deter, seed=102),
        "stoch": random(N, c.stoch, c.classes, seed=103),
    }
    noise = uniforms(T, N, c.stoch)
    mine, other = ({k: x.clone().requires_grad_() for k, x in values.items()} for _ in range(2))

    want = roll_out(*theirs, **other, is_first=is_first, uniform=noise, monkeypatch=monkeypatch)
    inputs = (mine["embed"], mine["action"], is_first, RSSMState(mine["deter"], mine["stoch"]))
    index = want[1].detach().argmax(-1)
    before = _native.calls()["rssm_observe"][0]
    got = model.observe(*inputs, force_stoch=index)
    assert _native.calls()["rssm_observe"][0] == before + 1
    outputs = got.deter, got.stoch, got.posterior, got.prior
    for a, b in zip(outputs, want, strict=True):
        assert_near(a, b, tolerance)
    assert torch.equal(model.observe(*inputs, noise=noise).index.long(), index)

    cotangents = [random(*x.shape, seed=200 + i) for i, x in enumerate(want)]
    parameters = dict(model.named_parameters())
    got = torch.autograd.grad(outputs, [*mine.values(), *parameters.values()], cotangents)
    pairs = pairing(*theirs)
    leaves = [*other.values(), *(pairs[name] for name in parameters)]
    want = torch.autograd.grad(want, leaves, cotangents)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_near(a if i < len(mine) else like_theirs(a), b, tolerance)


def test_imagination_agrees(model, theirs, tolerance):
    c = CONFIG
    action, noise = 1.5 * random(T, N, c.action, seed=101), uniforms(T, N, c.stoch)
    deter, stoch = random(N, c.deter, seed=102), random(N, c.stoch, c.classes, seed=103)
    layers = (
        Layer(torch.ones(4, c.feat).double(), scale=torch.ones(4).double()),
        Layer(torch.ones(2, 4).double()),
    )
    with torch.no_grad():
        state = RSSMState(deter, stoch)
        got = model.imagine(Policy(layers), state, T, noise=noise, force_action=action)
        assert got.path == "kernel"
        stoch = stoch.flatten(1)
        for t in range(T):
            logits, stoch, deter = theirs[0](stoch, deter, action[t], _uniform=noise[t])
            assert_near(got.deter[t + 1], deter, tolerance)
            assert_near(got.prior[t], logits, tolerance)
            assert_near(got.stoch[t + 1].flatten(1), stoch, 1e-10)
