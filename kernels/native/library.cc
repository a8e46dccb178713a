// What XLA calls.

#include "attention.h"
#include "maps.h"
#include "newton_schulz.h"

extern "C" XLA_FFI_Error* golf_xsa_forward(XLA_FFI_CallFrame* frame) { return handle(frame, forward); }
extern "C" XLA_FFI_Error* golf_xsa_backward(XLA_FFI_CallFrame* frame) { return handle(frame, backward); }
extern "C" XLA_FFI_Error* golf_unstack(XLA_FFI_CallFrame* frame) { return handle(frame, unstack); }
extern "C" XLA_FFI_Error* golf_linear(XLA_FFI_CallFrame* frame) { return handle(frame, linear); }
extern "C" XLA_FFI_Error* golf_mlp(XLA_FFI_CallFrame* frame) { return handle(frame, mlp); }
extern "C" XLA_FFI_Error* golf_newton_schulz(XLA_FFI_CallFrame* frame) { return handle(frame, newton_schulz<float>); }
extern "C" XLA_FFI_Error* golf_newton_schulz_bf16(XLA_FFI_CallFrame* frame) { return handle(frame, newton_schulz<Half>); }
