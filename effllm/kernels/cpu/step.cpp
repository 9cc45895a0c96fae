// Step programs: a whole graph of few tokens in one call, without returning to the caller between its operations.
//
// A program is a list of instructions over views of tensors (step.h), made by lowering/step_code.py from a graph that passes have rewritten.
// Every instruction is cut into tasks; all tasks of all instructions run in one parallel region, in order, each instruction starting when
// the one before it is done (phases.h). Decoding one token of a small model is thirty times a dozen operations of some microseconds: what a
// call, an allocation and a hand-over to other threads cost each would be more than the work.
//
// Numerics  every instruction computes in fp32 and rounds once to what it writes.
// Errors    an index out of range stops the call with an error; what it would have written stays as it was.
#include <chrono>

#include "step_ops.h"

namespace {

using namespace effllm;
using namespace effllm::step;
using torch::stable::Tensor;

enum class Code : int64_t { copy, binary, unary, norm, glu, rotate, write, packed, packed_a8, quantize, attend, dense };

struct Instruction {
  Code code;
  int64_t level = 0, tasks = 1;
  const int64_t* args = nullptr;
  int64_t operands = 0;  // index of its first view
};

// Reads a program: [instructions, tensors, then per instruction: code, level, arguments, views, arguments.., views..].
struct Reader {
  const int64_t* at;
  const std::vector<char*>& base;
  Operand view() {
    Operand v;
    const int64_t slot = *at++, offset = *at++;
    v.kind = static_cast<Kind>(*at++);
    std::copy(at, at + kDims, v.size), std::copy(at + kDims, at + 2 * kDims, v.stride);
    at += 2 * kDims;
    v.data = slot < 0 ? nullptr : base[static_cast<size_t>(slot)] + offset * size_of(v.kind);
    return v;
  }
};

struct Program {
  std::vector<Instruction> instructions;
  std::vector<Operand> views;
  std::vector<int64_t> first;  // task of each instruction
  std::vector<int64_t> start;  // task of each level
};

int64_t nanoseconds(std::chrono::steady_clock::time_point from) { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - from).count(); }

void step_program(const Tensor code, const Tensor numbers, const Tensor addresses, const Tensor workspace, int64_t threads, std::optional<Tensor> profile) {
  // slots: the program itself (integer constants), its numbers, the workspace, then the tensors of the call
  static thread_local std::vector<char*> base;
  static thread_local Program p;
  const auto* words = static_cast<const int64_t*>(code.const_data_ptr());
  const int64_t count = addresses.numel();
  STD_TORCH_CHECK(count == words[1], "effllm: a step program of ", words[1], " tensors got ", count);
  base.assign({const_cast<char*>(reinterpret_cast<const char*>(words)), const_cast<char*>(static_cast<const char*>(numbers.const_data_ptr())), static_cast<char*>(workspace.mutable_data_ptr())});
  // addresses, not tensors: a list of five hundred tensors takes a millisecond to cross the boundary
  for (int64_t i = 0; i < count; ++i) base.push_back(reinterpret_cast<char*>(static_cast<const int64_t*>(addresses.const_data_ptr())[i]));
  Reader r{words + 2, base};
  p.instructions.clear(), p.views.clear(), p.first.clear(), p.start.clear();
  for (int64_t i = 0; i < words[0]; ++i) {
    Instruction ins{static_cast<Code>(r.at[0]), r.at[1]};
    const int64_t args = r.at[2], views = r.at[3];
    ins.args = r.at + 4, ins.operands = static_cast<int64_t>(p.views.size());
    r.at += 4 + args;
    for (int64_t v = 0; v < views; ++v) p.views.push_back(r.view());
    p.instructions.push_back(ins);
  }
  const auto* constants = static_cast<const float*>(numbers.const_data_ptr());
  int64_t tasks = 0;
  for (auto& ins : p.instructions) {
    const Operand* v = p.views.data() + ins.operands;
    ins.tasks = ins.code == Code::packed || ins.code == Code::packed_a8 ? packed_tasks(v, ins.args, threads)
              : ins.code == Code::dense ? dense_tasks(v, threads)
              : ins.code == Code::attend ? attend_tasks(v, threads)
              : ins.code == Code::quantize ? 1
              : few_tasks(ins.code == Code::rotate ? v[1] : ins.code == Code::write ? v[2] : v[0], threads);
    while (static_cast<int64_t>(p.start.size()) <= ins.level) p.start.push_back(tasks);
    p.first.push_back(tasks);
    tasks += ins.tasks;
  }
  p.start.push_back(tasks);
  std::atomic<int64_t> bad{-1};
  int64_t* spent = nullptr;  // nanoseconds of each instruction over all threads, then those of the call
  if (profile) {
    STD_TORCH_CHECK(profile->numel() == words[0] + 1, "effllm: a profile has one entry an instruction and one more");
    spent = static_cast<int64_t*>(profile->mutable_data_ptr());
  }
  const auto began = std::chrono::steady_clock::now();
  static std::atomic<int64_t> calls{0};
  const int64_t call = calls.fetch_add(1);
  in_phases(p.start.data(), static_cast<int64_t>(p.start.size()) - 1, threads, [program = &p, constants, call, spent, &bad](int64_t level, int64_t of_level) {
    const int64_t number = program->start[static_cast<size_t>(level)] + of_level;
    const int64_t index = std::upper_bound(program->first.begin(), program->first.end(), number) - program->first.begin() - 1;
    const int64_t task = number - program->first[static_cast<size_t>(index)];
    const Instruction& ins = program->instructions[static_cast<size_t>(index)];
    const Operand* v = program->views.data() + ins.operands;
    const int64_t of = ins.tasks, *a = ins.args;
    const auto from = spent ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point();
    switch (ins.code) {
      case Code::copy: copy(v[0], v[1], task, of); break;
      case Code::binary: binary(v[0], v[1], v[2], a[0], task, of); break;
      case Code::unary: unary(v[0], v[1], a[0], task, of); break;
      case Code::norm: norm(v, a, constants, task, of); break;
      case Code::glu: glu(v[0], v[1], v[2], a[0], task, of); break;
      case Code::rotate: if (!rotate(v[0], v[1], v[2], v[3], v[4], a, task, of)) bad.store(index); break;
      case Code::write: if (!write(v[0], v[1], v[2], a[0], task, of)) bad.store(index); break;
      case Code::packed: packed(v, a, constants, false, call, index, task, of); break;
      case Code::packed_a8: packed(v, a, constants, true, call, index, task, of); break;
      case Code::quantize: quantize(v[0], v[1], v[2]); break;
      case Code::attend: attend_task(v, constants[a[0]], task, of); break;
      case Code::dense: dense(v, call, index, task, of); break;
    }
    if (spent) std::atomic_ref<int64_t>(spent[index]).fetch_add(nanoseconds(from), std::memory_order_relaxed);
  });
  if (spent) spent[words[0]] += nanoseconds(began);
  STD_TORCH_CHECK(bad.load() < 0, "effllm: index_copy_ past the end of a cache (instruction ", bad.load(), " of a step program)");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("step_program(Tensor code, Tensor numbers, Tensor addresses, Tensor workspace, int threads, Tensor? profile=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { m.impl("step_program", TORCH_BOX(&step_program)); }
