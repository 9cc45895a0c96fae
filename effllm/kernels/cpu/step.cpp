// Step programs: a whole graph of few tokens in one call, without returning to the caller between its operations.
//
// A program is a list of instructions over views of tensors (step.h), made by lowering/step_code.py from a graph that passes have rewritten.
// Every instruction is cut into tasks; the tasks of neighbouring instructions run in one parallel region, in order, each instruction starting when
// the one before it is done (phases.h). A call (calls.h) runs between two regions, with threads of its own. Decoding one token of a small model is thirty times a dozen operations of some microseconds: what a
// call, an allocation and a hand-over to other threads cost each would be more than the work.
//
// Numerics  every instruction computes in fp32 and rounds once to what it writes.
// Errors    an index out of range stops the call with an error; what it would have written stays as it was.
#include <chrono>
#include <map>
#include <memory>

#include "calls.h"
#include "step_rows.h"

namespace EFFLLM_NAMESPACE {
static std::map<std::string, Boxed>& offered() {
  static std::map<std::string, Boxed> ops;
  return ops;
}
void remember(const char* name, Boxed op) { offered()[name] = op; }
Boxed find(const std::string& name) {
  const auto at = offered().find(name);
  return at == offered().end() ? nullptr : at->second;
}
}  // namespace EFFLLM_NAMESPACE

namespace {

using namespace effllm;
using namespace effllm::step;
using torch::stable::Tensor;

enum class Code : int64_t { copy, binary, unary, norm, glu, rotate, write, packed, packed_a8, quantize, attend, dense, rows, packed_rows, largest, call };

struct Instruction {
  Code code;
  int64_t level = 0, tasks = 1;
  const int64_t* args = nullptr;
  int64_t operands = 0, views = 0;  // index of its first view, and how many
};

struct Moved { size_t view; int64_t tensor, offset; };  // a view of a tensor that lies elsewhere in every call; bytes

struct Program {
  std::vector<Instruction> instructions;
  std::vector<Operand> views;
  std::vector<int64_t> first;  // task of each instruction
  std::vector<int64_t> start;  // task of each level
  std::vector<int64_t> leading;  // instruction that begins each level
  std::vector<std::pair<int64_t, step::Call>> calls;  // by instruction: ops that run by themselves, on all threads, between regions
  std::vector<Moved> moved;
  const float* constants = nullptr;
  int64_t threads = 1;
};

// Slots: the program itself (integer constants), its numbers, the workspace, then the tensors of the call. A negative slot is nothing, or a range
// of integers that nobody stored: its view's offset is where it starts, its strides are what it counts by.
constexpr int64_t kRange = -2, kFirstTensor = 3;

// Reads a program: [instructions, tensors, then per instruction: code, level, arguments, views, arguments.., views..].
// `moves` are the positions of tensors whose addresses come with each run.
void decode(Program& p, const Tensor& code, const Tensor& numbers, const Tensor& addresses, const Tensor& workspace, int64_t threads, const int64_t* moves, int64_t move_count) {
  static thread_local std::vector<char*> base;
  static thread_local std::vector<int64_t> moving;
  const auto* words = static_cast<const int64_t*>(code.const_data_ptr());
  const int64_t count = addresses.numel();
  STD_TORCH_CHECK(count == words[1], "effllm: a step program of ", words[1], " tensors got ", count);
  base.assign({const_cast<char*>(reinterpret_cast<const char*>(words)), const_cast<char*>(static_cast<const char*>(numbers.const_data_ptr())), static_cast<char*>(workspace.mutable_data_ptr())});
  // addresses, not tensors: a list of five hundred tensors takes a millisecond to cross the boundary
  for (int64_t i = 0; i < count; ++i) base.push_back(reinterpret_cast<char*>(static_cast<const int64_t*>(addresses.const_data_ptr())[i]));
  moving.assign(static_cast<size_t>(count), -1);
  for (int64_t i = 0; i < move_count; ++i) {
    STD_TORCH_CHECK(moves[i] >= 0 && moves[i] < count, "effllm: a step program has no tensor ", moves[i]);
    moving[static_cast<size_t>(moves[i])] = i;
  }
  p.instructions.clear(), p.views.clear(), p.first.clear(), p.start.clear(), p.leading.clear(), p.calls.clear(), p.moved.clear();
  p.constants = static_cast<const float*>(numbers.const_data_ptr()), p.threads = threads;
  const int64_t* at = words + 2;
  int64_t tasks = 0;
  for (int64_t i = 0; i < words[0]; ++i) {
    Instruction ins{static_cast<Code>(at[0]), at[1]};
    const int64_t args = at[2];
    ins.args = at + 4, ins.operands = static_cast<int64_t>(p.views.size()), ins.views = at[3];
    at += 4 + args;
    for (int64_t j = 0; j < ins.views; ++j) {
      Operand v;
      const int64_t slot = *at++, offset = *at++;
      v.kind = static_cast<Kind>(*at++);
      std::copy(at, at + kDims, v.size), std::copy(at + kDims, at + 2 * kDims, v.stride);
      at += 2 * kDims;
      v.begin = slot == kRange ? offset : kNoRange;
      v.data = slot < 0 ? nullptr : base[static_cast<size_t>(slot)] + offset * size_of(v.kind);
      if (slot >= kFirstTensor && moving[static_cast<size_t>(slot - kFirstTensor)] >= 0)
        p.moved.push_back({p.views.size(), moving[static_cast<size_t>(slot - kFirstTensor)], offset * size_of(v.kind)});
      p.views.push_back(v);
    }
    const Operand* v = p.views.data() + ins.operands;
    ins.tasks = ins.code == Code::packed || ins.code == Code::packed_a8 ? packed_tasks(v, ins.args, threads)
              : ins.code == Code::dense ? dense_tasks(v, threads)
              : ins.code == Code::attend ? attend_tasks(v, threads)
              : ins.code == Code::call ? 0
              : ins.code == Code::largest ? v[0].rows() * v[0].inner()
              : ins.code == Code::quantize || ins.code == Code::rows || ins.code == Code::packed_rows ? 1
              : few_tasks(ins.code == Code::rotate ? v[1] : ins.code == Code::write ? v[2] : v[0], threads);
    while (static_cast<int64_t>(p.start.size()) <= ins.level) p.start.push_back(tasks), p.leading.push_back(i);
    if (ins.code == Code::call) p.calls.emplace_back(i, step::Call(ins.args, ins.views));
    p.first.push_back(tasks);
    p.instructions.push_back(ins);
    tasks += ins.tasks;
  }
  p.start.push_back(tasks);
}

int64_t nanoseconds(std::chrono::steady_clock::time_point from) { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - from).count(); }

// What the instruction after this one is going to read of the program: by then the weights of this one have driven it out of the caches.
inline void fetch_next(const Program& p, int64_t index) {
  if (index + 1 >= static_cast<int64_t>(p.instructions.size())) return;
  const Instruction& next = p.instructions[static_cast<size_t>(index + 1)];
  const auto* views = reinterpret_cast<const char*>(p.views.data() + next.operands);
  for (int64_t byte = 0; byte < next.views * static_cast<int64_t>(sizeof(Operand)); byte += 64) __builtin_prefetch(views + byte);
  for (int word = 0; word < 24; word += 8) __builtin_prefetch(next.args + word);
}

void run(Program& p, int64_t* spent) {
  std::atomic<int64_t> bad{-1};
  const auto began = std::chrono::steady_clock::now();
  static std::atomic<int64_t> calls{0};
  const int64_t call = calls.fetch_add(1);
  auto region = [program = &p, call, spent, &bad](int64_t level, int64_t of_level) {
    if (bad.load(std::memory_order_relaxed) >= 0) return;  // nothing is written any more
    const int64_t number = program->start[static_cast<size_t>(level)] + of_level, instructions = static_cast<int64_t>(program->instructions.size());
    int64_t index = program->leading[static_cast<size_t>(level)];
    while (index + 1 < instructions && program->first[static_cast<size_t>(index + 1)] <= number) ++index;
    const int64_t task = number - program->first[static_cast<size_t>(index)];
    const Instruction& ins = program->instructions[static_cast<size_t>(index)];
    const Operand* v = program->views.data() + ins.operands;
    const float* constants = program->constants;
    const int64_t of = ins.tasks, *a = ins.args;
    const auto from = spent ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point();
    fetch_next(*program, index);
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
      case Code::rows: if (!rows(v[0], v[1], v[2])) bad.store(index); break;
      case Code::largest: largest(v[0], v[1], task); break;
      case Code::packed_rows: if (!packed_rows(v, a, constants)) bad.store(index); break;
      case Code::call: break;  // has no tasks
    }
    if (spent) std::atomic_ref<int64_t>(spent[index]).fetch_add(nanoseconds(from), std::memory_order_relaxed);
  };
  const int64_t levels = static_cast<int64_t>(p.start.size()) - 1;
  int64_t done = 0;  // levels
  for (auto& [index, op] : p.calls) {
    const Instruction& ins = p.instructions[static_cast<size_t>(index)];
    if (ins.level > done) in_phases(p.start.data() + done, ins.level - done, p.threads, [&](int64_t level, int64_t task) { region(done + level, task); });
    done = ins.level;
    if (bad.load() >= 0) break;
    const auto from = std::chrono::steady_clock::now();
    op(p.views.data() + ins.operands);
    if (spent) spent[index] += nanoseconds(from) * p.threads;
  }
  if (bad.load() < 0) in_phases(p.start.data() + done, levels - done, p.threads, [&](int64_t level, int64_t task) { region(done + level, task); });
  if (spent) spent[p.instructions.size()] += nanoseconds(began);
  if (bad.load() < 0) return;
  const Code code = p.instructions[static_cast<size_t>(bad.load())].code;
  STD_TORCH_CHECK(code != Code::rows && code != Code::packed_rows, "effllm: a token id outside of the embedding (instruction ", bad.load(), " of a step program)");
  STD_TORCH_CHECK(false, "effllm: index_copy_ past the end of a cache (instruction ", bad.load(), " of a step program)");
}

int64_t* times_of(const std::optional<Tensor>& profile, const Program& p) {
  if (!profile) return nullptr;
  STD_TORCH_CHECK(profile->numel() == static_cast<int64_t>(p.instructions.size()) + 1, "effllm: a profile has one entry an instruction and one more");
  return static_cast<int64_t*>(profile->mutable_data_ptr());
}

void step_program(const Tensor code, const Tensor numbers, const Tensor addresses, const Tensor workspace, int64_t threads, std::optional<Tensor> profile) {
  static thread_local Program p;
  decode(p, code, numbers, addresses, workspace, threads, nullptr, 0);
  run(p, times_of(profile, p));
}

// A program with its tensors, read once for many runs; only tensors `moves` lie elsewhere in each. For one caller at a time, who keeps all
// tensors alive, and releases it.
int64_t step_bind(const Tensor code, const Tensor numbers, const Tensor addresses, const Tensor workspace, int64_t threads, const Tensor moves) {
  auto p = std::make_unique<Program>();
  decode(*p, code, numbers, addresses, workspace, threads, static_cast<const int64_t*>(moves.const_data_ptr()), moves.numel());
  return reinterpret_cast<int64_t>(p.release());
}
void step_run(int64_t bound, const Tensor moved, std::optional<Tensor> profile) {
  Program& p = *reinterpret_cast<Program*>(bound);
  const auto* address = static_cast<const int64_t*>(moved.const_data_ptr());
  for (const Moved& m : p.moved) p.views[m.view].data = reinterpret_cast<char*>(address[m.tensor]) + m.offset;
  run(p, times_of(profile, p));
}
void step_release(int64_t bound) { delete reinterpret_cast<Program*>(bound); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("step_program(Tensor code, Tensor numbers, Tensor addresses, Tensor workspace, int threads, Tensor? profile=None) -> ()");
  m.def("step_bind(Tensor code, Tensor numbers, Tensor addresses, Tensor workspace, int threads, Tensor moves) -> int");
  m.def("step_run(int bound, Tensor moved, Tensor? profile=None) -> ()");
  m.def("step_release(int bound) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) {
  m.impl("step_program", TORCH_BOX(&step_program));
  m.impl("step_bind", TORCH_BOX(&step_bind));
  m.impl("step_run", TORCH_BOX(&step_run));
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CompositeExplicitAutograd, m) { m.impl("step_release", TORCH_BOX(&step_release)); }
