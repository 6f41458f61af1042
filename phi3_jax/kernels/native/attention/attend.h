// The two ways of attending, for a few query rows and for a block of them. Both add to sums [rows, padded(head_dim)],
// maxima [rows] and totals [rows] (the sums of p) what the task's slots contribute.
#pragma once
#include <cstdint>

#include "attention/attention.h"
#include "attention/rows.h"

namespace phi3 {

constexpr int64_t kFewRows = 4;

// Up to kFewRows rows.
void attend_few(const AttentionTask& task, const Rows& rows, float* scratch, float* sums, float* maxima, float* totals);

// Any number of rows. maxima and totals are kBlockRows long, and sums has rows to a multiple of 4.
void attend_block(const AttentionTask& task, const Rows& rows, float* scratch, float* sums, float* maxima,
                  float* totals);

// Floats of the scratch that attend_block needs; attend_few needs less.
int64_t block_scratch(int64_t head_dim);

}  // namespace phi3
