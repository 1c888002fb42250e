// What torch built for the CPU lacks of a GPU: a guard that knows which device is the current one. It starts nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceType;
using Interface = c10::impl::DeviceGuardImplInterface;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override {
    return Device(DeviceType::CUDA, 0);
  }
  Device exchangeDevice(Device /*unused*/) const override {
    return getDevice();
  }
};

static const Guard guard;

// Puts `next` in the place of the guard there is, and returns that one.
extern "C" const void* exchange_guard(const void* next) {
  auto& place = c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  return place.exchange(static_cast<const Interface*>(next));
}

extern "C" const void* pretended_guard() {
  return static_cast<const Interface*>(&guard);
}
