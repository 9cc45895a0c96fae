// What the units include from outside, read once for all of them where many are compiled (units.py). A unit that includes less than this compiles
// without it too: each names what it needs.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>
