// torch tensors without torch: our own declarations of the public DLPack 1.x C ABI (only what is read here), and the
// test that a view fits a kernel. torch >= 2.10 offers DLPackExchangeAPI as a capsule on torch.Tensor; see
// bindings.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pywm::abi {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
struct DType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct View {  // DLTensor: borrowed, valid as long as the tensor is not resized
  void* data;
  Device device;
  int32_t ndim;
  DType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct Managed {  // DLManagedTensorVersioned: a tensor that whoever takes it over frees through `deleter`
  Version version;
  void* context;
  void (*deleter)(Managed* self);
  uint64_t flags;
  View view;
};
struct Header {
  Version version;
  Header* prev;
};
struct Exchange {  // DLPackExchangeAPI, major version 1
  Header header;
  void* allocate;
  void* managed_from_python;
  int (*managed_to_python)(Managed* taken, void** out);
  int (*view_from_python)(void* object, View* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};
static_assert(sizeof(View) == 48 && offsetof(View, shape) == 24 && offsetof(Managed, view) == 32 &&
              offsetof(Exchange, view_from_python) == 40);

enum : int32_t { kCPU = 1, kCUDA = 2 };
enum : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6 };

template <typename T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr uint8_t code = kFloat;
};
template <>
struct TypeOf<double> {
  static constexpr uint8_t code = kFloat;
};
template <>
struct TypeOf<int64_t> {
  static constexpr uint8_t code = kInt;
};
template <>
struct TypeOf<uint8_t> {  // masks: torch.bool, one byte
  static constexpr uint8_t code = kBool;
};

template <typename T>
bool is_type(const View& v) {
  return v.dtype.code == TypeOf<T>::code && v.dtype.bits == 8 * sizeof(T) && v.dtype.lanes == 1;
}

inline bool is_bytes(const View& v) { return v.dtype.code == kUInt && v.dtype.bits == 8 && v.dtype.lanes == 1; }

inline bool same_device(const View& a, const View& b) {
  return a.device.type == b.device.type && a.device.id == b.device.id;
}

inline int64_t numel(const View& v) {
  int64_t n = 1;
  for (int i = 0; i < v.ndim; ++i) n *= v.shape[i];
  return n;
}

inline bool is_contiguous(const View& v) {
  if (!v.strides || numel(v) == 0) return true;
  int64_t expected = 1;
  for (int i = v.ndim - 1; i >= 0; --i) {
    if (v.shape[i] == 1) continue;
    if (v.strides[i] != expected) return false;
    expected *= v.shape[i];
  }
  return true;
}

}  // namespace pywm::abi
