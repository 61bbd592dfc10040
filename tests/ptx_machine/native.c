/* Accesses to memory and matrix products in C: what shared_memory.py, global_memory.py, warps.py and tensor_cores.py do in NumPy,
   where nothing is wrong. A function returns 1 if it has done everything. It returns 0 without having changed anything where it
   sees a fault, a race or something to note: then NumPy does it all, and says what is wrong. (Only two threads that write different
   values to one place are seen after the fact; NumPy then writes them again.) */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 2048 }; /* no batch has more */
typedef int64_t i64;

typedef struct { /* see SharedMemory */
  uint8_t *bytes;
  i64 *clock, *fenced;
  int16_t *writer;
  int32_t *written, *written_by, *read, *read_by;
  i64 size, warps, agents, granule;
} Shared;

typedef struct { /* see Allocation */
  i64 begin, size;
  int32_t *writer, *reader;
} Allocation;

/* --- clocks of shared memory */
static i64 granules(const Shared *s, i64 size) { return size <= s->granule ? 1 : size / s->granule; }

/* The arrays of warps, agents and times have one element for all accesses if `each` is 0. */
static int may_read(const Shared *s, i64 n, const i64 *at, i64 size, const i64 *warps, i64 each, int async) {
  i64 k = granules(s, size);
  for (i64 i = 0; i < n; i++) {
    i64 w = warps[i * each];
    const i64 *clock = s->clock + w * s->agents;
    for (i64 g = at[i] / s->granule, end = g + k; g < end; g++) {
      i64 writer = s->writer[g];
      if (writer < 0 || (clock[writer] < s->written[g] && writer != w % s->warps)) return 0;
      if (async && writer < 2 * s->warps && s->fenced[g * s->granule / s->size * s->agents + writer] < s->written[g]) return 0;
    }
  }
  return 1;
}

static void have_read(Shared *s, int id, i64 n, const i64 *at, i64 size, const i64 *agents, const i64 *times, i64 each) {
  i64 k = granules(s, size), row = 4 * s->warps;
  for (i64 i = 0; i < n; i++)
    for (i64 g = at[i] / s->granule, end = g + k; g < end; g++) {
      s->read[g * row + agents[i * each]] = (int32_t)times[i * each];
      s->read_by[g] = id;
    }
}

int check_read(Shared *s, int id, i64 n, const i64 *at, i64 size, const i64 *warps, const i64 *agents, const i64 *times, i64 each,
               int async) {
  if (!may_read(s, n, at, size, warps, each, async)) return 0;
  have_read(s, id, n, at, size, agents, times, each);
  return 1;
}

/* The warpgroup whose first warp is `first` reads pieces of 16 bytes by wgmma. groups: of each warp, how many groups it has committed. */
int group_reads(Shared *s, int id, i64 n, const i64 *at, i64 first, const i64 *groups) {
  for (i64 w = first; w < first + 4; w++)
    if (!may_read(s, n, at, 16, &w, 0, 1)) return 0;
  for (i64 w = first; w < first + 4; w++) {
    i64 agent = 2 * s->warps + w % s->warps, time = groups[w] + 1;
    have_read(s, id, n, at, 16, &agent, &time, 0);
  }
  return 1;
}

/* What is there already may be written by whoever likes; `values` are NULL where that doesn't count. */
static int may_write(const Shared *s, i64 n, const i64 *at, i64 size, const i64 *warps, i64 each, const uint8_t *values) {
  i64 k = granules(s, size), row = 4 * s->warps;
  for (i64 i = 0; i < n; i++) {
    i64 w = warps[i * each], local = w % s->warps;
    const i64 *clock = s->clock + w * s->agents;
    for (i64 g = at[i] / s->granule, end = g + k; g < end; g++) {
      i64 writer = s->writer[g];
      int wrong = writer >= 0 && writer != local && clock[writer] < s->written[g];
      const int32_t *read = s->read + g * row;
      for (i64 a = 0; a < row; a++) wrong |= read[a] > clock[a] && a != local;
      if (wrong && (!values || memcmp(s->bytes + at[i], values + i * size, size))) return 0;
    }
  }
  return 1;
}

static void have_written(Shared *s, int id, i64 n, const i64 *at, i64 size, const i64 *agents, const i64 *times, i64 each) {
  i64 k = granules(s, size);
  for (i64 i = 0; i < n; i++)
    for (i64 g = at[i] / s->granule, end = g + k; g < end; g++) {
      s->writer[g] = (int16_t)agents[i * each];
      s->written[g] = (int32_t)times[i * each];
      s->written_by[g] = id;
    }
}

int check_write(Shared *s, int id, i64 n, const i64 *at, i64 size, const i64 *warps, const i64 *agents, const i64 *times, i64 each,
                const uint8_t *values) {
  if (!may_write(s, n, at, size, warps, each, values)) return 0;
  have_written(s, id, n, at, size, agents, times, each);
  return 1;
}

/* --- what a profiler counts */
static void count_wavefronts(i64 n, const i64 *at, i64 total, const i64 *warps, const i64 *lanes, i64 *counts) {
  i64 part = total == 8 ? 16 : total == 16 ? 8 : 32, words = total / 4 > 1 ? total / 4 : 1;
  i64 seen[32][64], many[32], last = -1;
  for (i64 i = 0; i < n;) {
    i64 group = warps[i] * 8 + lanes[i] / part, most = 0;
    memset(many, 0, sizeof many);
    for (; i < n && warps[i] * 8 + lanes[i] / part == group; i++)
      for (i64 j = 0; j < words; j++) {
        i64 word = at[i] / 4 + j, bank = word & 31, found = 0;
        for (i64 l = 0; l < many[bank]; l++) found |= seen[bank][l] == word;
        if (!found) seen[bank][many[bank]++] = word;
        if (many[bank] > most) most = many[bank];
      }
    counts[0] += 1;
    counts[1] += most - 1;
    counts[2] += group / 8 != last;
    last = group / 8;
  }
}

static void count_sectors(i64 n, const uint64_t *a, i64 total, const i64 *warps, i64 *counts) {
  uint64_t seen[32];
  for (i64 i = 0; i < n;) {
    i64 w = warps[i], many = 0;
    for (; i < n && warps[i] == w; i++) {
      i64 found = 0;
      for (i64 l = 0; l < many; l++) found |= seen[l] == a[i] >> 5;
      if (!found) seen[many++] = a[i] >> 5;
    }
    counts[0] += many;
    counts[2] += 1;
  }
  counts[1] += n * total;
}

/* --- the lanes' accesses to shared memory */
typedef struct {
  i64 n, lane[LANES], at[LANES], within[LANES], warp[LANES], local[LANES], time[LANES], in_warp[LANES];
} Accesses;

/* Of the lanes in q (NULL: all); whether they are aligned and within bounds. */
static int accesses(const Shared *s, i64 lanes, i64 threads, const uint32_t *a, const uint8_t *q, i64 total, Accesses *x) {
  x->n = 0;
  for (i64 lane = 0; lane < lanes; lane++) {
    if (q && !q[lane]) continue;
    if ((a[lane] & (total - 1)) || (i64)a[lane] + total > s->size) return 0;
    i64 i = x->n++, w = lane / 32;
    x->lane[i] = lane, x->within[i] = a[lane], x->at[i] = a[lane] + lane / threads * s->size;
    x->warp[i] = w, x->local[i] = w % s->warps, x->in_warp[i] = lane % 32;
    x->time[i] = s->clock[w * s->agents + w % s->warps];
  }
  return 1;
}

/* out: (n, lanes) elements of which the first as many as lanes access are filled. */
int shared_load(Shared *s, int id, i64 lanes, i64 threads, const uint32_t *a, const uint8_t *q, i64 size, i64 n, uint8_t *out,
                i64 *counts) {
  static Accesses x;
  i64 total = size * n;
  if (!accesses(s, lanes, threads, a, q, total, &x) || !may_read(s, x.n, x.at, total, x.warp, 1, 0)) return 0;
  have_read(s, id, x.n, x.at, total, x.local, x.time, 1);
  for (i64 j = 0; j < n; j++)
    for (i64 i = 0; i < x.n; i++) memcpy(out + (j * lanes + i) * size, s->bytes + x.at[i] + j * size, size);
  if (counts) count_wavefronts(x.n, x.within, total, x.warp, x.in_warp, counts);
  return 1;
}

static int same(const uint8_t *a, const uint8_t *b, i64 size) {
  if (!memcmp(a, b, size)) return 1;
  uint32_t x, y;
  if (size != 4) return 0;
  memcpy(&x, a, 4), memcpy(&y, b, 4);
  return (x & 0x7FFFFFFF) > 0x7F800000 && (y & 0x7FFFFFFF) > 0x7F800000; /* two NaNs: see `differ` */
}

/* values: n arrays of elements, one for each lane. */
int shared_store(Shared *s, int id, i64 lanes, i64 threads, const uint32_t *a, const uint8_t *q, i64 size, i64 n,
                 const uint8_t **values, i64 *counts) {
  static Accesses x;
  static uint8_t data[LANES * 16];
  i64 total = size * n;
  if (!accesses(s, lanes, threads, a, q, total, &x)) return 0;
  for (i64 i = 0; i < x.n; i++)
    for (i64 j = 0; j < n; j++) memcpy(data + i * total + j * size, values[j] + x.lane[i] * size, size);
  if (!may_write(s, x.n, x.at, total, x.warp, 1, data)) return 0;
  have_written(s, id, x.n, x.at, total, x.local, x.time, 1);
  for (i64 i = 0; i < x.n; i++) memcpy(s->bytes + x.at[i], data + i * total, total);
  for (i64 i = 0; i < x.n; i++)
    for (i64 j = 0; j < n; j++)
      if (!same(s->bytes + x.at[i] + j * size, data + i * total + j * size, size)) return 0;
  if (counts) count_wavefronts(x.n, x.within, total, x.warp, x.in_warp, counts);
  return 1;
}

void get_rows(const uint8_t *bytes, i64 n, const i64 *at, i64 size, uint8_t *data) {
  for (i64 i = 0; i < n; i++) memcpy(data + i * size, bytes + at[i], size);
}

void put_rows(uint8_t *bytes, i64 n, const i64 *at, i64 size, const uint8_t *data) {
  for (i64 i = 0; i < n; i++) memcpy(bytes + at[i], data + i * size, size);
}

/* --- global memory */
static const Allocation *find(const Allocation *all, i64 count, const Allocation *last, uint64_t a, i64 total) {
  if (last && (i64)a >= last->begin && (i64)a + total <= last->begin + last->size) return last;
  for (i64 i = count - 1; i >= 0; i--) /* they are sorted */
    if (all[i].begin <= (i64)a) return (i64)a + total <= all[i].begin + all[i].size ? &all[i] : 0;
  return 0;
}

static void has_read(const Allocation *from, i64 offset, int32_t mine) {
  int32_t before = from->reader[offset];
  from->reader[offset] = before == 0 || before == mine ? mine : -1;
}

int global_load(const Allocation *all, i64 count, i64 lanes, const uint32_t *ctas, const uint64_t *a, const uint8_t *q, i64 size,
                i64 n, uint8_t *out, i64 *counts) {
  static const Allocation *from[LANES];
  static i64 lane[LANES], warp[LANES];
  static uint64_t at[LANES];
  i64 total = size * n, m = 0;
  const Allocation *last = 0;
  for (i64 l = 0; l < lanes; l++) {
    if (q && !q[l]) continue;
    if (a[l] & (total - 1) || !(last = find(all, count, last, a[l], total))) return 0;
    int32_t writer = last->writer[a[l] - last->begin];
    if (writer && writer != (int32_t)ctas[l] + 1) return 0;
    from[m] = last, lane[m] = l, warp[m] = l / 32, at[m++] = a[l];
  }
  for (i64 i = 0; i < m; i++) {
    has_read(from[i], at[i] - from[i]->begin, (int32_t)ctas[lane[i]] + 1);
    for (i64 j = 0; j < n; j++) memcpy(out + (j * lanes + i) * size, (const uint8_t *)at[i] + j * size, size);
  }
  if (counts) count_sectors(m, at, total, warp, counts);
  return 1;
}

int global_store(const Allocation *all, i64 count, i64 lanes, const uint32_t *ctas, const uint64_t *a, const uint8_t *q, i64 size,
                 const uint8_t **values, i64 n, i64 *counts) {
  static const Allocation *to[LANES];
  static i64 lane[LANES], warp[LANES];
  static uint64_t at[LANES];
  i64 total = size * n, m = 0;
  const Allocation *last = 0;
  for (i64 l = 0; l < lanes; l++) {
    if (q && !q[l]) continue;
    if (a[l] & (total - 1) || !(last = find(all, count, last, a[l], total))) return 0;
    i64 offset = a[l] - last->begin;
    int32_t mine = (int32_t)ctas[l] + 1, reader = last->reader[offset], writer = last->writer[offset];
    if ((reader && reader != mine) || (writer && writer != mine)) return 0;
    to[m] = last, lane[m] = l, warp[m] = l / 32, at[m++] = a[l];
  }
  for (i64 i = 0; i < m; i++) {
    i64 offset = at[i] - to[i]->begin;
    for (i64 j = 0; j < total; j++) to[i]->writer[offset + j] = (int32_t)ctas[lane[i]] + 1;
    for (i64 j = 0; j < n; j++) memcpy((uint8_t *)at[i] + j * size, values[j] + lane[i] * size, size);
  }
  for (i64 i = 0; i < m; i++)
    for (i64 j = 0; j < n; j++)
      if (!same((const uint8_t *)at[i] + j * size, values[j] + lane[i] * size, size)) return 0;
  if (counts) count_sectors(m, at, total, warp, counts);
  return 1;
}

/* cp.async. Args: given: bytes that are read, all or none. places, data: where the copies go and what they are, one after the
   other. first: of each warp, which of these is its first; one more at the end. */
int copy_async(Shared *s, int id, const Allocation *all, i64 count, i64 lanes, i64 threads, const uint32_t *ctas, const uint32_t *to,
               const uint64_t *of, const uint32_t *given, const uint8_t *q, i64 size, const i64 *groups, int at_once, i64 *places,
               uint8_t *data, i64 *first, i64 *counts) {
  static Accesses x;
  static const Allocation *from[LANES];
  static i64 agent[LANES], time[LANES], warp[LANES];
  static uint64_t at[LANES];
  const Allocation *last = 0;
  i64 m = 0;
  if (!accesses(s, lanes, threads, to, q, size, &x)) return 0;
  for (i64 i = 0; i < x.n; i++) {
    i64 l = x.lane[i], w = x.warp[i];
    agent[i] = s->warps + w % s->warps, time[i] = groups[w] + 1, from[i] = 0;
    if (given[l] != 0 && given[l] != (uint32_t)size) return 0;
    if (!given[l]) continue;
    if (of[l] & (size - 1) || !(last = find(all, count, last, of[l], size))) return 0;
    int32_t writer = last->writer[of[l] - last->begin];
    if (writer && writer != (int32_t)ctas[l] + 1) return 0;
    from[i] = last, warp[m] = w, at[m++] = of[l];
  }
  if (!may_write(s, x.n, x.at, size, x.warp, 1, 0)) return 0;
  have_written(s, id, x.n, x.at, size, agent, time, 1);
  i64 warps = lanes / 32, w = 0;
  for (i64 i = 0; i < x.n; i++) {
    i64 l = x.lane[i];
    while (w <= x.warp[i]) first[w++] = i;
    places[i] = x.at[i];
    if (from[i]) {
      has_read(from[i], of[l] - from[i]->begin, (int32_t)ctas[l] + 1);
      memcpy(data + i * size, (const void *)of[l], size);
    } else
      memset(data + i * size, 0, size);
    if (at_once) memcpy(s->bytes + x.at[i], data + i * size, size);
  }
  while (w <= warps) first[w++] = x.n;
  if (counts && m) count_sectors(m, at, size, warp, counts);
  return 1;
}

/* --- products */
enum { BF16, F16, TF32 };

static double number(int kind, const uint8_t *p) {
  uint32_t bits = 0;
  float f;
  if (kind == F16) {
    _Float16 h;
    memcpy(&h, p, 2);
    return (double)h;
  }
  memcpy(&bits, p, kind == TF32 ? 4 : 2);
  bits = kind == TF32 ? bits & 0xFFFFE000 : bits << 16;
  memcpy(&f, &bits, 4);
  return f;
}

/* Pieces of 16 bytes of shared memory as numbers: (rows, columns), or their transpose. */
void operand(const uint8_t *bytes, i64 rows, i64 pieces, const i64 *at, int kind, int transposed, double *out) {
  i64 each = kind == TF32 ? 4 : 8, columns = pieces * each;
  for (i64 r = 0; r < rows; r++)
    for (i64 c = 0; c < columns; c++)
      out[transposed ? c * rows + r : r * columns + c] = number(kind, bytes + at[r * pieces + c / each] + c % each * (16 / each));
}

/* A warpgroup's product: accumulators (n / 2, lanes) of float32, of which these are the group's. a: (64, k), b: (k, n). */
void wgmma(i64 n, i64 k, const double *a, const double *b, int use, double sign, i64 lanes, float *accumulators) {
  double sum[256];
  for (i64 m = 0; m < 64; m++) {
    for (i64 j = 0; j < n; j++) sum[j] = 0;
    for (i64 l = 0; l < k; l++) {
      double f = a[m * k + l] * sign;
      for (i64 j = 0; j < n; j++) sum[j] += f * b[l * n + j];
    }
    i64 lane = m / 16 * 32 + m % 8 * 4, half = m / 8 % 2 * 2; /* which accumulator of four is a question of the row's half */
    for (i64 j = 0; j < n; j++) {
      float *c = accumulators + (j / 8 * 4 + half + j % 2) * lanes + lane + j % 8 / 2;
      *c = (float)(use ? sum[j] + *c : sum[j]);
    }
  }
}

/* Products of warps: the elements of a, b and c lie where the tables (elements, 32) say. a, b: (elements, lanes) of float64. */
void mma(i64 warps, i64 n, i64 k, i64 many_a, i64 many_b, i64 many_c, const i64 *at_a, const i64 *at_b, const i64 *at_c,
         const double *a, const double *b, double *c) {
  double A[16 * 32], B[32 * 8], C[16 * 8];
  i64 lanes = warps * 32, m = many_c * 32 / n;
  for (i64 w = 0; w < warps; w++) {
    for (i64 i = 0; i < many_a * 32; i++) A[at_a[i]] = a[i / 32 * lanes + w * 32 + i % 32];
    for (i64 i = 0; i < many_b * 32; i++) B[at_b[i]] = b[i / 32 * lanes + w * 32 + i % 32];
    for (i64 i = 0; i < m; i++)
      for (i64 j = 0; j < n; j++) {
        double sum = 0;
        for (i64 l = 0; l < k; l++) sum += A[i * k + l] * B[l * n + j];
        C[i * n + j] = sum;
      }
    for (i64 i = 0; i < many_c * 32; i++) c[i / 32 * lanes + w * 32 + i % 32] = C[at_c[i]];
  }
}

/* --- arithmetic */
void fma32(i64 n, const float *a, const float *b, const float *c, float *out) {
  for (i64 i = 0; i < n; i++) out[i] = fmaf(a[i], b[i], c[i]);
}
