// What PyTorch's autograd asks of a kind of device; its guard in Python knows one device alone.
#include <c10/core/impl/FakeGuardImpl.h>

C10_REGISTER_GUARD_IMPL(PrivateUse1, c10::impl::FakeGuardImpl<c10::DeviceType::PrivateUse1>);
