// Ops of this library, to torch and by name to step programs (calls.h).
#pragma once
#include <torch/csrc/stable/library.h>

#include <string>

// one registry in each library: several builds, for several instruction sets, may be loaded at once
namespace EFFLLM_NAMESPACE {
using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);
void remember(const char* name, Boxed op);
Boxed find(const std::string& name);  // null where there is none
}  // namespace EFFLLM_NAMESPACE

namespace effllm {

// In place of m.impl (name, op).
template <class Library> void offer(Library& m, const char* name, EFFLLM_NAMESPACE::Boxed op) {
  m.impl(name, op);
  EFFLLM_NAMESPACE::remember(name, op);
}

}  // namespace effllm
