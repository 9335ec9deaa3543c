/* A step through transformer blocks of the plain kind (Llama's and Qwen's), computed in float32 from weights in 32, 16, 8 or 4 bits.

   One call computes all blocks. Between the operations of a step of few tokens a general library runs code that the weights have driven out of
   the processor's caches; this loop fits into them. Weights are read once for all rows, as they lie: [outputs, inputs], row by row. For many
   tokens, as prompts are, they and the keys are laid out anew, a piece at a time.

   Threads share the work by taking pieces of it: who is not scheduled takes none, and holds nobody up. They are the caller's own, and wait for
   a step in here, without anything that the caller has only one of, such as Python's lock. */

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
int _fltused = 0; /* that floating point is used: there is no C library here */
int __stdcall DllMainCRTStartup(void *library, unsigned reason, void *reserved) {
    (void)library, (void)reason, (void)reserved;
    return 1;
}
__attribute__((no_builtin("memcpy"))) void *memcpy(void *to, const void *from, size_t size) {
    for (size_t i = 0; i < size; i++) ((char *)to)[i] = ((const char *)from)[i];
    return to;
}
__attribute__((no_builtin("memset"))) void *memset(void *to, int value, size_t size) {
    for (size_t i = 0; i < size; i++) ((char *)to)[i] = (char)value;
    return to;
}
typedef struct {
    void *state;
} Word;
__declspec(dllimport) int __stdcall SwitchToThread(void);
__declspec(dllimport) void __stdcall AcquireSRWLockExclusive(Word *lock);
__declspec(dllimport) void __stdcall ReleaseSRWLockExclusive(Word *lock);
__declspec(dllimport) int __stdcall SleepConditionVariableSRW(Word *news, Word *lock, unsigned milliseconds, unsigned shared);
__declspec(dllimport) void __stdcall WakeConditionVariable(Word *news);
static Word board, news;
#define give_way() SwitchToThread()
#define take_board() AcquireSRWLockExclusive(&board)
#define leave_board() ReleaseSRWLockExclusive(&board)
#define wait_for_news() SleepConditionVariableSRW(&news, &board, 0xffffffffu, 0)
#define tell_one() WakeConditionVariable(&news)
#else
#define EXPORT __attribute__((visibility("default")))
#include <pthread.h>
#include <sched.h>
static pthread_mutex_t board = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t news = PTHREAD_COND_INITIALIZER;
#define give_way() sched_yield()
#define take_board() pthread_mutex_lock(&board)
#define leave_board() pthread_mutex_unlock(&board)
#define wait_for_news() pthread_cond_wait(&news, &board)
#define tell_one() pthread_cond_signal(&news)
#endif

#if defined(__x86_64__)
#define pause_a_moment() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define pause_a_moment() __asm__ volatile("yield")
#else
#define pause_a_moment() ((void)0)
#endif

#if defined(__AVX512F__)
#define LANES 16
#define MOST_AT_ONCE 6 /* rows whose sums are kept in registers */
#elif defined(__AVX2__)
#define LANES 8
#define MOST_AT_ONCE 4
#else
#define LANES 4
#define MOST_AT_ONCE 4
#endif

#define MOST_ROWS 16
#define STREAMED 4       /* rows that one pass over an output's weights is fastest for */
#define OUTPUTS 4        /* of a matrix that are computed together */
#define AWAKE 2000       /* looks at a counter before the core is offered to others */
#define STAGES 6         /* of a block, each of which needs all of the one before */
#define HEAD STAGES      /* the stage of a layer behind all blocks */
#define PIECES 8         /* for each thread, of each stage */
#define COMPLETE -1      /* a stage, and what one thread alone does behind it */

typedef float lanes __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t whole __attribute__((vector_size(LANES * 4), aligned(4)));
#define always static inline __attribute__((always_inline))
#define apart static __attribute__((noinline)) /* so that no frame of the stack exceeds a page, for which Windows wants a library's help */

/* How numbers lie in memory. */
enum { FLOAT32, BFLOAT16, INT4, INT8 };

/* In INT4: GROUP inputs of PANEL outputs, that is level * scale + least. A byte has the levels of two inputs, that of the first half in its
   lower bits. A weight is [panels, groups] of them; outputs that the last panel has too many are of no account. */
#define GROUP 32
#define PANEL 16
typedef struct {
    _Float16 scales[PANEL], leasts[PANEL];
    uint8_t levels[GROUP / 2][PANEL];
} Panel;

/* In INT8: level * scale, and each half of the inputs has scales of its own. */
typedef struct {
    _Float16 scales[2][PANEL];
    int8_t levels[GROUP][PANEL];
} Panel8;

/* A weight [outputs, inputs] of a kind, and a bias [outputs] or NULL. */
typedef struct {
    const void *weight;
    const float *bias;
    int64_t outputs, inputs, kind;
} Linear;

/* One block. Norms are RMS norms; those of queries and keys are NULL where there are none. turns: whether positions are rotated in. kept: the
   kind of what sessions hold, FLOAT32 or BFLOAT16. */
typedef struct {
    Linear queries, keys, values, out, gate, up, down;
    const float *norm, *mlp_norm, *query_norm, *key_norm;
    float eps, mlp_eps, query_eps, key_eps, scale;
    int32_t query_heads, key_heads, size, turns, kept;
} Block;

/* Where a session keeps keys and values of one block: [heads, slots, size] each, of the tokens from `first` on. window: 0 is none. */
typedef struct {
    void *keys, *values;
    int64_t slots, first, window, chunked;
} Held;

/* One token of the step: the session's Held of each block, the token's position, and where it is in the rotary tables. */
typedef struct {
    const Held *held;
    int64_t position, angle;
} Row;

/* count: of blocks. first: of those that sessions have, the one that these begin with. Without any, the head alone is computed, of as many rows as there are, each `width` behind the one before. */
typedef struct Step {
    const Block *blocks;
    const Row *rows;
    const float *cosines, *sines; /* [positions, turning] each */
    float *hidden;                /* [rows, width]: what goes in, and what comes out of the blocks */
    float *work;                  /* petals_step_floats() of them; for a head alone of more than MOST_ROWS, petals_many_floats() */
    const Linear *head;           /* of what comes out; or NULL */
    float *outputs;               /* [rows, head's outputs] */
    int64_t first, count, row_count, width, turning, threads;
    int64_t wanted, came;         /* threads that should help, and those that do */
    _Atomic int64_t inside;       /* those that are not through */
    struct Step *next;
    struct {
        _Atomic int32_t taken, done;
    } *stages;                    /* [count, STAGES], and one for a head */
} Step;

always lanes load(const float *from) {
    lanes value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

#define shuffle __builtin_shufflevector
typedef float four __attribute__((vector_size(16)));

/* Four sums that together are that of all lanes. */
always four folded(lanes value) {
#if LANES == 16
    typedef float eight __attribute__((vector_size(32)));
    eight half = shuffle(value, value, 0, 1, 2, 3, 4, 5, 6, 7) + shuffle(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
    return shuffle(half, half, 0, 1, 2, 3) + shuffle(half, half, 4, 5, 6, 7);
#elif LANES == 8
    return shuffle(value, value, 0, 1, 2, 3) + shuffle(value, value, 4, 5, 6, 7);
#else
    return value;
#endif
}

always float sum(lanes value) {
    four part = folded(value);
    return (part[0] + part[2]) + (part[1] + part[3]);
}

/* LANES numbers from the index `i` on, of a kind that is known when it is compiled. */
always lanes numbers(const void *from, int64_t i, int kind) {
    if (kind == FLOAT32) return load((const float *)from + i);
    typedef uint16_t upper_halves __attribute__((vector_size(LANES * 2), aligned(2)));
    typedef uint32_t words __attribute__((vector_size(LANES * 4), aligned(4)));
    upper_halves upper;
    __builtin_memcpy(&upper, (const uint16_t *)from + i, sizeof upper);
    union { words bits; lanes value; } both = {.bits = __builtin_convertvector(upper, words) << 16};
    return both.value;
}

always float number(const void *from, int64_t i, int kind) {
    if (kind == FLOAT32) return ((const float *)from)[i];
    union { uint32_t bits; float value; } both = {.bits = (uint32_t)((const uint16_t *)from)[i] << 16};
    return both.value;
}

always const void *row_of(const void *weight, int64_t row, int64_t size, int kind) {
    return (const char *)weight + row * size * (kind == FLOAT32 ? 4 : 2);
}

/* results[row * stride] = inputs[row] . weight, one output of up to STREAMED rows, whose number is known when it is compiled. Weights come as
   one stream, which is fetched as fast as memory gives it. */
always void stream(const void *weight, int64_t size, const float *inputs, int kind, int rows, float *results, int64_t stride) {
    const int64_t width = kind == FLOAT32 ? 4 : 2, line = 64, ahead = 8192; /* bytes */
    const int chains = rows <= 2 ? 4 : 2;                                   /* sums that do not wait for one another */
    lanes sums[STREAMED][4] = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) {
#pragma unroll
        for (int part = 0; part < 4; part++) {
            lanes these = numbers(weight, i + part * LANES, kind);
            for (int row = 0; row < rows; row++) sums[row][part % chains] += these * load(inputs + row * size + i + part * LANES);
        }
        for (int64_t at = 0; at < 4 * LANES * width; at += line) __builtin_prefetch((const char *)weight + i * width + at + ahead);
    }
    for (; i + LANES <= size; i += LANES)
        for (int row = 0; row < rows; row++) sums[row][0] += numbers(weight, i, kind) * load(inputs + row * size + i);
    for (int row = 0; row < rows; row++) {
        float total = sum((sums[row][0] + sums[row][1]) + (sums[row][2] + sums[row][3]));
        for (int64_t rest = i; rest < size; rest++) total += number(weight, rest, kind) * inputs[row * size + rest];
        results[row * stride] = total;
    }
}

#if MOST_AT_ONCE > STREAMED
/* The sums of four at once, in a fraction of the steps. */
always four four_sums(const lanes values[4]) {
    four a = folded(values[0]), b = folded(values[1]), c = folded(values[2]), d = folded(values[3]);
    four ab = shuffle(a, b, 0, 4, 1, 5) + shuffle(a, b, 2, 6, 3, 7), cd = shuffle(c, d, 0, 4, 1, 5) + shuffle(c, d, 2, 6, 3, 7);
    return shuffle(ab, cd, 0, 1, 4, 5) + shuffle(ab, cd, 2, 3, 6, 7);
}

/* results[row * stride + output] = inputs[row] . weight[output] for OUTPUTS outputs and `rows` rows of a kind, both known when it is compiled.
   ahead: fetch the weights of the next outputs meanwhile. */
always void tile(const void *weight, int64_t size, const float *inputs, int kind, int rows, float *results, int64_t stride, int ahead) {
    lanes sums[MOST_AT_ONCE][OUTPUTS];
    const char *of[OUTPUTS];
    int64_t next = (const char *)row_of(weight, OUTPUTS, size, kind) - (const char *)weight, i = 0;
    for (int output = 0; output < OUTPUTS; output++) of[output] = row_of(weight, output, size, kind);
    for (int row = 0; row < rows; row++)
        for (int output = 0; output < OUTPUTS; output++) sums[row][output] = (lanes){0};
    for (; i + LANES <= size; i += LANES) {
        lanes part[OUTPUTS];
        for (int output = 0; output < OUTPUTS; output++) {
            part[output] = numbers(of[output], i, kind);
            if (ahead) __builtin_prefetch(of[output] + next + i * (kind == FLOAT32 ? 4 : 2));
        }
        for (int row = 0; row < rows; row++) {
            lanes input = load(inputs + row * size + i);
            for (int output = 0; output < OUTPUTS; output++) sums[row][output] += input * part[output];
        }
    }
    for (int row = 0; row < rows; row++) {
        four totals = four_sums(sums[row]);
        __builtin_memcpy(results + row * stride, &totals, sizeof totals);
        for (int64_t rest = i; rest < size; rest++)
            for (int output = 0; output < OUTPUTS; output++) results[row * stride + output] += number(of[output], rest, kind) * inputs[row * size + rest];
    }
}

#endif

/* The same for any numbers up to MOST_ROWS and OUTPUTS. */
always void products_of(const void *weight, int64_t size, const float *all_inputs, int64_t rows, int64_t outputs, float *all_results, int64_t stride, int kind) {
    int64_t most = outputs < OUTPUTS ? STREAMED : MOST_AT_ONCE;
    for (int64_t done = 0; done < rows;) {
        int64_t parts = (rows - done + most - 1) / most, now = (rows - done + parts - 1) / parts;
        const float *inputs = all_inputs + done * size;
        float *results = all_results + done * stride;
        done += now;
#if MOST_AT_ONCE > STREAMED
        if (now > STREAMED) {
            if (now == 5) tile(weight, size, inputs, kind, 5, results, stride, done == rows);
            else tile(weight, size, inputs, kind, 6, results, stride, done == rows);
            continue;
        }
#endif
        for (int64_t output = 0; output < outputs; output++) {
            const void *row = row_of(weight, output, size, kind);
            switch (now) {
                case 1: stream(row, size, inputs, kind, 1, results + output, stride); break;
                case 2: stream(row, size, inputs, kind, 2, results + output, stride); break;
                case 3: stream(row, size, inputs, kind, 3, results + output, stride); break;
                case 4: stream(row, size, inputs, kind, 4, results + output, stride); break;
            }
        }
    }
}

static void products(const void *weight, int64_t kind, int64_t size, const float *inputs, int64_t rows, int64_t outputs, float *results, int64_t stride) {
    if (kind == FLOAT32) products_of(weight, size, inputs, rows, outputs, results, stride, FLOAT32);
    else products_of(weight, size, inputs, rows, outputs, results, stride, BFLOAT16);
}

/* Of a byte's lower bits, and of its upper ones. */
always void levels_of(const uint8_t *from, lanes *low, lanes *high) {
    typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1)));
    bytes pairs;
    __builtin_memcpy(&pairs, from, sizeof pairs);
    whole both = __builtin_convertvector(pairs, whole);
    *low = __builtin_convertvector(both & 15, lanes), *high = __builtin_convertvector(both >> 4, lanes);
}

always lanes signed_levels(const int8_t *from) {
    typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1)));
    bytes value;
    __builtin_memcpy(&value, from, sizeof value);
    return __builtin_convertvector(__builtin_convertvector(value, whole), lanes);
}

always lanes halves(const _Float16 *from) {
    typedef _Float16 half __attribute__((vector_size(LANES * 2), aligned(2)));
    half value;
    __builtin_memcpy(&value, from, sizeof value);
    return __builtin_convertvector(value, lanes);
}

/* What a panel's levels stand for: values[i * stride + output] of its inputs. */
static void values_of(const Panel *panel, float *values, int64_t stride) {
    for (int part = 0; part < PANEL; part += LANES) {
        lanes scale = halves(panel->scales + part), least = halves(panel->leasts + part);
        for (int i = 0; i < GROUP / 2; i++) {
            lanes low, high;
            levels_of(panel->levels[i] + part, &low, &high);
            low = low * scale + least, high = high * scale + least;
            __builtin_memcpy(values + i * stride + part, &low, sizeof low);
            __builtin_memcpy(values + (i + GROUP / 2) * stride + part, &high, sizeof high);
        }
    }
}

static void values_of8(const Panel8 *panel, float *values, int64_t stride) {
    for (int part = 0; part < PANEL; part += LANES)
        for (int i = 0; i < GROUP; i++) {
            lanes value = signed_levels(panel->levels[i] + part) * halves(panel->scales[i / (GROUP / 2)] + part);
            __builtin_memcpy(values + i * stride + part, &value, sizeof value);
        }
}

#define MOST_OF_PANEL (LANES == 8 ? 4 : 8) /* rows whose sums are kept in registers */

/* results[row][output] of the outputs of a panel, for `rows` rows and a kind, which are known when it is compiled. sums: of each group of
   inputs, for INT4. */
always void panel_of(const void *weight, int64_t size, const float *inputs, const float *sums, int kind, int rows, float results[][PANEL]) {
    const int chains = rows == 1 ? 4 : 2; /* sums that do not wait for one another */
    int64_t groups = size / GROUP;
    for (int part = 0; part < PANEL; part += LANES) {
        lanes totals[MOST_OF_PANEL];
        for (int row = 0; row < rows; row++) totals[row] = (lanes){0};
        for (int64_t group = 0; group < groups; group++) {
            const Panel *four_bits = (const Panel *)weight + group;
            const Panel8 *eight_bits = (const Panel8 *)weight + group;
            const float *input = inputs + group * GROUP;
            lanes of_group[4][MOST_OF_PANEL];
            for (int chain = 0; chain < chains; chain++)
                for (int row = 0; row < rows; row++) of_group[chain][row] = (lanes){0};
#pragma unroll
            for (int i = 0; i < GROUP / 2; i++) {
                lanes low, high;
                if (kind == INT4) levels_of(four_bits->levels[i] + part, &low, &high);
                else low = signed_levels(eight_bits->levels[i] + part), high = signed_levels(eight_bits->levels[i + GROUP / 2] + part);
                for (int row = 0; row < rows; row++) {
                    of_group[2 * i % chains][row] += low * input[row * size + i];
                    of_group[(2 * i + 1) % chains][row] += high * input[row * size + i + GROUP / 2];
                }
            }
            for (int row = 0; row < rows; row++) {
                lanes low = of_group[0][row], high = of_group[1][row];
                if (chains == 4) low += of_group[2][row], high += of_group[3][row];
                if (kind == INT4)
                    totals[row] += (low + high) * halves(four_bits->scales + part) + halves(four_bits->leasts + part) * sums[row * groups + group];
                else totals[row] += low * halves(eight_bits->scales[0] + part) + high * halves(eight_bits->scales[1] + part);
            }
        }
        for (int row = 0; row < rows; row++) __builtin_memcpy(results[row] + part, &totals[row], sizeof totals[row]);
    }
}

always void panel_of_kind(const void *weight, int64_t size, const float *inputs, const float *sums, int kind, int64_t rows, float results[][PANEL]) {
    for (int64_t done = 0; done < rows;) {
        int64_t parts = (rows - done + MOST_OF_PANEL - 1) / MOST_OF_PANEL, now = (rows - done + parts - 1) / parts;
        const float *these = inputs + done * size, *their_sums = sums + done * (size / GROUP);
        switch (now) {
            case 1: panel_of(weight, size, these, their_sums, kind, 1, results + done); break;
            case 2: panel_of(weight, size, these, their_sums, kind, 2, results + done); break;
            case 3: panel_of(weight, size, these, their_sums, kind, 3, results + done); break;
            case 4: panel_of(weight, size, these, their_sums, kind, 4, results + done); break;
#if LANES != 8
            case 5: panel_of(weight, size, these, their_sums, kind, 5, results + done); break;
            case 6: panel_of(weight, size, these, their_sums, kind, 6, results + done); break;
            case 7: panel_of(weight, size, these, their_sums, kind, 7, results + done); break;
            case 8: panel_of(weight, size, these, their_sums, kind, 8, results + done); break;
#endif
        }
        done += now;
    }
}

apart void panel4(const void *weight, int64_t size, const float *inputs, const float *sums, int64_t rows, float results[][PANEL]) {
    panel_of_kind(weight, size, inputs, sums, INT4, rows, results);
}

apart void panel8(const void *weight, int64_t size, const float *inputs, const float *sums, int64_t rows, float results[][PANEL]) {
    panel_of_kind(weight, size, inputs, sums, INT8, rows, results);
}

/* Of each group of inputs, [rows, size / GROUP]. */
static void sum_groups(const float *inputs, int64_t rows, int64_t size, float *sums) {
    for (int64_t group = 0; group < rows * (size / GROUP); group++, inputs += GROUP) {
        lanes total = {0};
        for (int i = 0; i < GROUP; i += LANES) total += load(inputs + i);
        sums[group] = sum(total);
    }
}

/* Of outputs of a layer from the first on, `count` of one panel, without its bias. sums: of groups of inputs, for a weight in INT4. */
static void of_layer(const Linear *layer, int64_t first, const float *inputs, const float *sums, int64_t rows, int64_t count, float results[][PANEL]) {
    int64_t size = layer->inputs, before = first % PANEL;
    if (layer->kind == INT4 || layer->kind == INT8) {
        float all[MOST_ROWS][PANEL];
        int64_t panel = first / PANEL * (size / GROUP);
        if (layer->kind == INT4) panel4((const Panel *)layer->weight + panel, size, inputs, sums, rows, all);
        else panel8((const Panel8 *)layer->weight + panel, size, inputs, sums, rows, all);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < count; i++) results[row][i] = all[row][before + i];
        return;
    }
    for (int64_t i = 0; i < count; i += OUTPUTS) {
        const void *weight = row_of(layer->weight, first + i, size, (int)layer->kind);
        products(weight, layer->kind, size, inputs, rows, count - i < OUTPUTS ? count - i : OUTPUTS, results[0] + i, PANEL);
    }
}

/* How many outputs from the first on, before the last, are in one panel. */
always int64_t of_panel(int64_t first, int64_t last) {
    int64_t left = PANEL - first % PANEL;
    return last - first < left ? last - first : left;
}

/* Outputs [from, to) of a layer, for all rows: to[row * stride + output] = or += . */
apart void linear(const Linear *layer, const float *inputs, const float *sums, int64_t rows, int64_t from, int64_t to, float *outputs, int64_t stride, int add) {
    float results[MOST_ROWS][PANEL];
    for (int64_t first = from, count; first < to; first += count) {
        count = of_panel(first, to);
        of_layer(layer, first, inputs, sums, rows, count, results);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < count; i++) {
                float value = results[row][i] + (layer->bias ? layer->bias[first + i] : 0);
                float *place = outputs + row * stride + first + i;
                *place = add ? *place + value : value;
            }
    }
}

/* Many rows: weights are laid out anew, some inputs of some outputs at a time, and each piece is multiplied with all rows. */
#define DEEP 256 /* inputs of such a piece */
#if LANES == 16
#define VECTORS 2      /* of its outputs */
#define ROWS_AT_ONCE 12
#elif LANES == 8
#define VECTORS 2
#define ROWS_AT_ONCE 6
#else
#define VECTORS 4
#define ROWS_AT_ONCE 6
#endif
#define WIDE (VECTORS * LANES)

/* The rows of a square become its columns: in each round rows of both halves are put together, number by number. */
always void transpose(lanes rows[LANES]) {
    for (int round = 1; round < LANES; round *= 2) {
        lanes mixed[LANES];
#pragma unroll
        for (int i = 0; i < LANES / 2; i++) {
            lanes a = rows[i], b = rows[i + LANES / 2];
#if LANES == 16
            mixed[2 * i] = shuffle(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            mixed[2 * i + 1] = shuffle(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif LANES == 8
            mixed[2 * i] = shuffle(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
            mixed[2 * i + 1] = shuffle(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
            mixed[2 * i] = shuffle(a, b, 0, 4, 1, 5);
            mixed[2 * i + 1] = shuffle(a, b, 2, 6, 3, 7);
#endif
        }
        for (int i = 0; i < LANES; i++) rows[i] = mixed[i];
    }
}

/* square[output][i] of some inputs from `begin` on of `count` outputs, where there are not LANES of both; the others are zeros. */
always void corner_of(const void *rows, int64_t inputs, int64_t count, int64_t begin, int64_t left, int kind, lanes square[LANES]) {
    for (int64_t output = 0; output < LANES; output++) {
        square[output] = (lanes){0};
        for (int64_t i = 0; output < count && i < LANES && i < left; i++) square[output][i] = number(row_of(rows, output, inputs, kind), begin + i, kind);
    }
}

/* columns[i][output] of the inputs [begin, begin + deep) of `count` outputs from the first on; the others are zeros. */
always void columns_of(const Linear *layer, int64_t first, int64_t count, int64_t begin, int64_t deep, int kind, float columns[][WIDE]) {
    for (int64_t side = 0; side < WIDE; side += LANES)
        for (int64_t i = 0; i < deep; i += LANES) {
            lanes square[LANES];
            const void *rows = row_of(layer->weight, first + side, layer->inputs, kind);
            if (side + LANES <= count && i + LANES <= deep) {
#pragma unroll
                for (int64_t output = 0; output < LANES; output++) square[output] = numbers(row_of(rows, output, layer->inputs, kind), begin + i, kind);
            } else corner_of(rows, layer->inputs, count - side, begin + i, deep - i, kind, square);
            transpose(square);
            for (int64_t rest = 0; rest < LANES && i + rest < deep; rest++)
                __builtin_memcpy(&columns[i + rest][side], &square[rest], sizeof square[rest]);
        }
}

apart void columns_of_float32(const Linear *layer, int64_t first, int64_t count, int64_t begin, int64_t deep, float columns[][WIDE]) {
    columns_of(layer, first, count, begin, deep, FLOAT32, columns);
}

apart void columns_of_bfloat16(const Linear *layer, int64_t first, int64_t count, int64_t begin, int64_t deep, float columns[][WIDE]) {
    columns_of(layer, first, count, begin, deep, BFLOAT16, columns);
}

apart void columns_of_panels(const Linear *layer, int64_t first, int64_t begin, int64_t deep, float columns[][WIDE]) {
    int64_t groups = layer->inputs / GROUP, panels = (layer->outputs + PANEL - 1) / PANEL;
    for (int64_t side = 0; side < WIDE && first / PANEL + side / PANEL < panels; side += PANEL)
        for (int64_t group = 0; group < deep / GROUP; group++) {
            int64_t which = (first + side) / PANEL * groups + begin / GROUP + group;
            if (layer->kind == INT4) values_of((const Panel *)layer->weight + which, &columns[group * GROUP][side], WIDE);
            else values_of8((const Panel8 *)layer->weight + which, &columns[group * GROUP][side], WIDE);
        }
}

/* results += inputs [rows, deep] . columns, of `rows` rows, which are known when it is compiled. */
always void many_of(float columns[][WIDE], int64_t deep, const float *inputs, int64_t width, int rows, float *results, int64_t stride) {
    lanes sums[ROWS_AT_ONCE][VECTORS];
#pragma unroll
    for (int row = 0; row < rows; row++)
#pragma unroll
        for (int v = 0; v < VECTORS; v++) sums[row][v] = (lanes){0};
    for (int64_t i = 0; i < deep; i++) {
        lanes weights[VECTORS];
#pragma unroll
        for (int v = 0; v < VECTORS; v++) weights[v] = load(columns[i] + v * LANES);
#pragma unroll
        for (int row = 0; row < rows; row++)
#pragma unroll
            for (int v = 0; v < VECTORS; v++) sums[row][v] += weights[v] * inputs[row * width + i];
    }
#pragma unroll
    for (int row = 0; row < rows; row++)
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            sums[row][v] += load(results + row * stride + v * LANES); /* last: what has been summed up so far is large, and rounds coarsely */
            __builtin_memcpy(results + row * stride + v * LANES, &sums[row][v], sizeof sums[row][v]);
        }
}

apart void many_at_once(float columns[][WIDE], int64_t deep, const float *inputs, int64_t width, int64_t rows, float *results, int64_t stride) {
    switch (rows) {
        case 1: many_of(columns, deep, inputs, width, 1, results, stride); break;
        case 2: many_of(columns, deep, inputs, width, 2, results, stride); break;
        case 3: many_of(columns, deep, inputs, width, 3, results, stride); break;
        case 4: many_of(columns, deep, inputs, width, 4, results, stride); break;
        case 5: many_of(columns, deep, inputs, width, 5, results, stride); break;
        case 6: many_of(columns, deep, inputs, width, 6, results, stride); break;
#if ROWS_AT_ONCE == 12
        case 7: many_of(columns, deep, inputs, width, 7, results, stride); break;
        case 8: many_of(columns, deep, inputs, width, 8, results, stride); break;
        case 9: many_of(columns, deep, inputs, width, 9, results, stride); break;
        case 10: many_of(columns, deep, inputs, width, 10, results, stride); break;
        case 11: many_of(columns, deep, inputs, width, 11, results, stride); break;
        case 12: many_of(columns, deep, inputs, width, 12, results, stride); break;
#endif
    }
}

/* Of the weights of the outputs from the first on, for the inputs from `begin` on, a share is fetched, so that they are near when they are laid out. */
always void fetch_ahead(const Linear *layer, int64_t first, int64_t begin, int64_t share, int64_t shares) {
    if (layer->kind != FLOAT32 && layer->kind != BFLOAT16) return; /* panels lie one behind the other, which processors foresee */
    if (begin >= layer->inputs) begin = 0, first += WIDE;
    int64_t width = layer->kind == FLOAT32 ? 4 : 2, line = 64, left = layer->inputs - begin;
    int64_t outputs = layer->outputs - first < WIDE ? layer->outputs - first : WIDE, bytes = (left < DEEP ? left : DEEP) * width;
    for (int64_t output = share * outputs / shares; output < (share + 1) * outputs / shares; output++) {
        const char *row = (const char *)row_of(layer->weight, first + output, layer->inputs, (int)layer->kind) + begin * width;
        for (int64_t at = 0; at < bytes; at += line) __builtin_prefetch(row + at, 0, 2);
    }
}

/* Outputs [from, to) of a layer for any number of rows, `from` a multiple of PANEL: to[row * stride] and behind it = or += . scratch: DEEP x WIDE
   floats. */
apart void linear_of_many(const Linear *layer, const float *inputs, int64_t width, int64_t rows, int64_t from, int64_t to, float *outputs, int64_t stride, int add, float *scratch) {
    float(*columns)[WIDE] = (float(*)[WIDE])scratch, edge[ROWS_AT_ONCE][WIDE] = {0};
    for (int64_t first = from; first < to; first += WIDE, outputs += WIDE) {
        int64_t count = to - first < WIDE ? to - first : WIDE;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < count; i++)
                outputs[row * stride + i] = (add ? outputs[row * stride + i] : 0) + (layer->bias ? layer->bias[first + i] : 0);
        for (int64_t begin = 0; begin < layer->inputs; begin += DEEP) {
            int64_t deep = layer->inputs - begin < DEEP ? layer->inputs - begin : DEEP;
            if (layer->kind == FLOAT32) columns_of_float32(layer, first, count, begin, deep, columns);
            else if (layer->kind == BFLOAT16) columns_of_bfloat16(layer, first, count, begin, deep, columns);
            else columns_of_panels(layer, first, begin, deep, columns);
            int64_t shares = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
            for (int64_t row = 0, now; row < rows; row += now) {
                int64_t parts = (rows - row + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
                now = (rows - row + parts - 1) / parts;
                fetch_ahead(layer, first, begin + DEEP, shares - parts, shares);
                float *results = outputs + row * stride;
                if (count == WIDE) {
                    many_at_once(columns, deep, inputs + row * width + begin, width, now, results, stride);
                    continue;
                }
                for (int64_t i = 0; i < now; i++) __builtin_memcpy(edge[i], results + i * stride, count * sizeof **edge);
                many_at_once(columns, deep, inputs + row * width + begin, width, now, edge[0], WIDE);
                for (int64_t i = 0; i < now; i++) __builtin_memcpy(results + i * stride, edge[i], count * sizeof **edge);
            }
        }
    }
}

EXPORT int64_t petals_many_floats(int64_t threads) { return threads * DEEP * WIDE; }

static void rms_norm(const float *inputs, const float *weight, float eps, int64_t size, float *outputs) {
    float squares;
    stream(inputs, size, inputs, FLOAT32, 1, &squares, 1);
    float factor = 1 / __builtin_sqrtf(squares / (float)size + eps);
    for (int64_t i = 0; i < size; i++) outputs[i] = weight[i] * (inputs[i] * factor);
}

/* Rotates the first `turning` values of a head: its first half with its second. */
static void turn(float *head, const float *cosines, const float *sines, int64_t turning) {
    int64_t half = turning / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

/* e^x to a few units in the last place: 2^n e^r, with r within half of ln 2. */
always lanes exponential(lanes x) {
    const lanes least = (lanes){0} - 87, most = (lanes){0} + 88;
    x = __builtin_elementwise_min(__builtin_elementwise_max(x, least), most);
    lanes shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f; /* 1.5 x 2^23: what is behind the point falls off */
    lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes sum = r * (1.0f / 5040) + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    union { lanes value; whole bits; } power;
    power.bits = (__builtin_convertvector(n, whole) + 127) << 23;
    return sum * power.value;
}

/* Queries [count, size], at most MOST_ROWS, that share keys and values [tokens, size]; a softmax that is corrected as larger scores come. */
#define AT_ONCE 32
#define LOWEST -3e38f /* of scores */
always void attend_to(const float *queries, int64_t count, const void *keys, const void *values, int64_t tokens, int64_t size, float scale, float *out, int kind) {
    float most[MOST_ROWS], total[MOST_ROWS], scores[MOST_ROWS][AT_ONCE];
    for (int64_t query = 0; query < count; query++) most[query] = LOWEST, total[query] = 0;
    __builtin_memset(out, 0, count * size * sizeof *out);
    for (int64_t first = 0; first < tokens; first += AT_ONCE) {
        int64_t now = tokens - first < AT_ONCE ? tokens - first : AT_ONCE;
        for (int64_t i = 0; i < now; i += OUTPUTS) {
            int64_t of = now - i < OUTPUTS ? now - i : OUTPUTS;
            products(row_of(keys, first + i, size, kind), kind, size, queries, count, of, scores[0] + i, AT_ONCE);
        }
        for (int64_t query = 0; query < count; query++) {
            float highest = most[query], *shares = scores[query], *sums = out + query * size;
            for (int64_t i = 0; i < now; i++) {
                shares[i] *= scale;
                highest = shares[i] > highest ? shares[i] : highest;
            }
            float shrink = exponential((lanes){0} + (most[query] - highest))[0];
            most[query] = highest;
            total[query] *= shrink;
            for (int64_t i = now; i < AT_ONCE; i++) shares[i] = LOWEST;
            for (int64_t i = 0; i < AT_ONCE; i += LANES) {
                lanes share = exponential(load(shares + i) - highest);
                __builtin_memcpy(shares + i, &share, sizeof share);
            }
            for (int64_t i = 0; i < now; i++) total[query] += shares[i];
            for (int64_t d = 0; d < size; d++) sums[d] *= shrink;
            int64_t i = 0;
            for (; i + 4 <= now; i += 4) {
                const void *value = row_of(values, first + i, size, kind);
                for (int64_t d = 0; d < size; d++)
                    sums[d] += shares[i] * number(value, d, kind) + shares[i + 1] * number(value, size + d, kind) +
                               shares[i + 2] * number(value, 2 * size + d, kind) + shares[i + 3] * number(value, 3 * size + d, kind);
            }
            for (; i < now; i++)
                for (int64_t d = 0; d < size; d++) sums[d] += shares[i] * number(row_of(values, first + i, size, kind), d, kind);
        }
    }
    for (int64_t query = 0; query < count; query++)
        for (int64_t d = 0; d < size; d++) out[query * size + d] /= total[query];
}

apart void attend_float32(const float *queries, int64_t count, const void *keys, const void *values, int64_t tokens, int64_t size, float scale, float *out) {
    attend_to(queries, count, keys, values, tokens, size, scale, out, FLOAT32);
}

apart void attend_bfloat16(const float *queries, int64_t count, const void *keys, const void *values, int64_t tokens, int64_t size, float scale, float *out) {
    attend_to(queries, count, keys, values, tokens, size, scale, out, BFLOAT16);
}

/* Many tokens of a session look at a head of keys: some keys at a time are laid out side by side, and their values, and each piece is multiplied
   with all queries. */
#define KEYS 128    /* of such a piece */
#define QUERIES 192 /* at most, of all tokens and heads that share the keys */
#define multiple(size, of) (((size) + (of) - 1) / (of) * (of))

/* Its work in floats. Sums are as wide as the values are laid out. */
typedef struct {
    float *queries, *sums, *keys, *values, *scores, *most, *total;
    int64_t width, floats;
} Looking;

static Looking looking_of(const Block *block, float *work) {
    Looking parts = {.queries = work, .width = multiple(block->size, WIDE)};
    parts.sums = parts.queries + QUERIES * block->size;
    parts.keys = parts.sums + QUERIES * parts.width;
    parts.values = parts.keys + KEYS * block->size;
    parts.scores = parts.values + KEYS * parts.width;
    parts.most = parts.scores + ROWS_AT_ONCE * KEYS;
    parts.total = parts.most + QUERIES;
    parts.floats = parts.total + QUERIES - work;
    return parts;
}

/* Values [count, size] laid out as columns_of() does with weights: the first WIDE numbers of all keys, then the next ones. */
always void lay_out_values(const void *values, int64_t count, int64_t size, int kind, float *to) {
    for (int64_t first = 0; first < size; first += WIDE, to += KEYS * WIDE)
        for (int64_t key = 0; key < count; key++)
            for (int64_t side = 0; side < WIDE; side += LANES) {
                int64_t from = key * size + first + side, left = size - first - side;
                lanes these = {0};
                if (left >= LANES) these = numbers(values, from, kind);
                else
                    for (int64_t i = 0; i < left; i++) these[i] = number(values, from + i, kind);
                __builtin_memcpy(to + key * WIDE + side, &these, sizeof these);
            }
}

apart void values_float32(const void *values, int64_t count, int64_t size, float *to) { lay_out_values(values, count, size, FLOAT32, to); }

apart void values_bfloat16(const void *values, int64_t count, int64_t size, float *to) { lay_out_values(values, count, size, BFLOAT16, to); }

static void lay_out(const Block *block, const Held *held, int64_t index, int64_t count, Looking parts) {
    int64_t size = block->size;
    (block->kept == FLOAT32 ? values_float32 : values_bfloat16)(row_of(held->values, index, size, block->kept), count, size, parts.values);
    const Linear keys = {.weight = row_of(held->keys, index, size, block->kept), .inputs = size};
    for (int64_t first = 0; first < count; first += WIDE)
        (block->kept == FLOAT32 ? columns_of_float32 : columns_of_bfloat16)(&keys, first, count - first, 0, size, (float(*)[WIDE])(parts.keys + first * size));
}

always float largest(lanes value) {
    float most = value[0];
    for (int i = 1; i < LANES; i++) most = value[i] > most ? value[i] : most;
    return most;
}

/* Scores [0, end) of a query become shares; it sees those in [low, high). What it has summed up so far is brought to the largest score. */
static void weigh(float *scores, int64_t low, int64_t high, int64_t end, float *most, float *total, float *sums, int64_t width) {
    if (low >= high) {
        __builtin_memset(scores, 0, end * sizeof *scores);
        return;
    }
    for (int64_t i = 0; i < low; i++) scores[i] = LOWEST;
    for (int64_t i = high; i < multiple(end, LANES); i++) scores[i] = LOWEST;
    lanes greatest = load(scores), shares = {0};
    for (int64_t i = LANES; i < end; i += LANES) greatest = __builtin_elementwise_max(greatest, load(scores + i));
    float highest = largest(greatest);
    if (highest > *most) {
        float shrink = exponential((lanes){0} + (*most - highest))[0];
        *total *= shrink, *most = highest;
        for (int64_t i = 0; i < width; i++) sums[i] *= shrink;
    }
    for (int64_t i = 0; i < end; i += LANES) {
        lanes share = exponential(load(scores + i) - *most);
        shares += share;
        __builtin_memcpy(scores + i, &share, sizeof share);
    }
    *total += sum(shares);
}

/* Of a session's tokens, the first one that a block lets the one at a position see. */
always int64_t first_visible(const Held *held, int64_t position) {
    int64_t visible = 0;
    if (held->window) visible = held->chunked ? position - position % held->window : position - held->window + 1;
    return visible < held->first ? held->first : visible;
}

/* The `count` queries from `first` on, `shared` of each token from a position on, look at the keys [begin, begin + keys). */
static void look_at_some(const Held *held, int64_t position, int64_t shared, int64_t first, int64_t count, int64_t begin, int64_t keys, int64_t size, Looking parts) {
    int64_t last = position + (first + count - 1) / shared, end = last + 1 - begin < keys ? last + 1 - begin : keys; /* of the keys that any sees */
    if (end <= 0 || first_visible(held, position + first / shared) >= begin + keys) return;
    __builtin_memset(parts.scores, 0, count * KEYS * sizeof *parts.scores);
    for (int64_t key = 0; key < end; key += WIDE)
        many_at_once((float(*)[WIDE])(parts.keys + key * size), size, parts.queries + first * size, size, count, parts.scores + key, KEYS);
    for (int64_t i = 0; i < count; i++) {
        int64_t query = first + i, at = position + query / shared, low = first_visible(held, at) - begin, high = at + 1 - begin;
        low = low < 0 ? 0 : low < end ? low : end, high = high < low ? low : high < end ? high : end;
        weigh(parts.scores + i * KEYS, low, high, end, parts.most + query, parts.total + query, parts.sums + query * parts.width, parts.width);
    }
    for (int64_t side = 0; side < parts.width; side += WIDE)
        many_at_once((float(*)[WIDE])(parts.values + side * KEYS), end, parts.scores, KEYS, count, parts.sums + first * parts.width + side, parts.width);
}

/* What a stage works on, in floats behind one another in `work`; `scratch` of them are each thread's own. */
typedef struct {
    float *normed, *states, *attended, *activated, *sums, *own;
    int64_t normed_width, states_width, attended_width, activated_width, scratch, floats;
} Work;

/* Rows that are multiples of SAME_PLACE apart would meet in the same few places of the nearest cache. */
#define SAME_PLACE 512
always int64_t row_width(int64_t size, int64_t rows) { return size + (rows > MOST_ROWS && size % SAME_PLACE == 0 ? GROUP : 0); }

static Work work_for(const Block *block, int64_t rows, int64_t width, int64_t threads, float *floats) {
    int64_t attended = (int64_t)block->query_heads * block->size, activated = block->gate.outputs, most = width > attended ? width : attended;
    most = most > activated ? most : activated;
    Work work = {.normed_width = row_width(width, rows), .states_width = attended + 2 * (int64_t)block->key_heads * block->size,
                 .attended_width = row_width(attended, rows), .activated_width = row_width(activated, rows)};
    work.normed = floats;
    work.states = work.normed + rows * work.normed_width;
    work.attended = work.states + rows * work.states_width;
    work.activated = work.attended + rows * work.attended_width;
    work.own = work.sums = work.activated + rows * work.activated_width;
    if (rows > MOST_ROWS) {
        int64_t products = (DEEP + rows) * WIDE, looking = looking_of(block, work.own).floats;
        work.scratch = multiple(products > looking ? products : looking, GROUP);
        work.floats = work.own + threads * work.scratch - floats;
    } else work.floats = work.sums + rows * (most / GROUP) - floats;
    return work;
}

static Work work_of(const Step *step, const Block *block) { return work_for(block, step->row_count, step->width, step->threads, step->work); }

EXPORT int64_t petals_step_floats(const Block *block, int64_t rows, int64_t width, int64_t threads) {
    return work_for(block, rows, width, threads, (float *)0).floats;
}

/* [from, to) of what a stage has to do; the whole is as stage_size() says. scratch: the thread's own, for many rows. */
static void project(const Step *step, const Block *block, Work work, int64_t from, int64_t to, float *scratch) {
    const Linear *layers[] = {&block->queries, &block->keys, &block->values};
    int64_t begin = 0, unit = step->row_count > MOST_ROWS ? WIDE : 1;
    float *states = work.states;
    for (int i = 0; i < 3; i++) {
        int64_t end = begin + layers[i]->outputs, low = from > begin ? from : begin, high = to < end ? to : end;
        if (low < high && unit > 1)
            linear_of_many(layers[i], work.normed, work.normed_width, step->row_count, low - begin, high - begin, states + low - begin, work.states_width, 0, scratch);
        else if (low < high) linear(layers[i], work.normed, work.sums, step->row_count, low - begin, high - begin, states, work.states_width, 0);
        begin += multiple(layers[i]->outputs, unit), states += layers[i]->outputs;
    }
}

/* Outputs [from, to) of a layer, which are added to the hidden states. */
static void add(const Step *step, const Linear *layer, const float *inputs, int64_t width, Work work, int64_t from, int64_t to, float *scratch) {
    if (step->row_count > MOST_ROWS)
        linear_of_many(layer, inputs, width, step->row_count, from, to, step->hidden + from, step->width, 1, scratch);
    else linear(layer, inputs, work.sums, step->row_count, from, to, step->hidden, step->width, 1);
}

static void look(const Step *step, const Block *block, Work work, int64_t index, int64_t from, int64_t to) {
    int64_t size = block->size, shared = block->query_heads / block->key_heads;
    for (int64_t which = from; which < to; which++) { /* a head of keys of a row */
        int64_t row = which / block->key_heads, head = which % block->key_heads;
        const Held *held = step->rows[row].held + step->first + index;
        int64_t position = step->rows[row].position, visible = first_visible(held, position);
        int64_t begin = head * held->slots + visible - held->first, tokens = position - visible + 1;
        for (int64_t i = 0; i < shared; i += MOST_ROWS) {
            int64_t query = head * shared + i, count = shared - i < MOST_ROWS ? shared - i : MOST_ROWS;
            (block->kept == FLOAT32 ? attend_float32 : attend_bfloat16)(
                work.states + row * work.states_width + query * size, count, row_of(held->keys, begin, size, block->kept),
                row_of(held->values, begin, size, block->kept), tokens, size, block->scale,
                work.attended + row * work.attended_width + query * size);
        }
    }
}

/* The same for `tokens` of one session from a row on, and one head of keys. */
static void look_together(const Step *step, const Block *block, Work work, int64_t index, int64_t row, int64_t tokens, int64_t head, float *scratch) {
    const Held *held = step->rows[row].held + step->first + index;
    int64_t size = block->size, shared = block->query_heads / block->key_heads, count = tokens * shared;
    int64_t position = step->rows[row].position, end = position + tokens;
    Looking parts = looking_of(block, scratch);
    for (int64_t query = 0; query < count; query++) {
        const float *from = work.states + (row + query / shared) * work.states_width + (head * shared + query % shared) * size;
        for (int64_t i = 0; i < size; i++) parts.queries[query * size + i] = from[i] * block->scale;
        parts.most[query] = LOWEST, parts.total[query] = 0;
    }
    __builtin_memset(parts.sums, 0, count * parts.width * sizeof *parts.sums);
    for (int64_t begin = first_visible(held, position), keys; begin < end; begin += keys) {
        keys = end - begin < KEYS ? end - begin : KEYS;
        lay_out(block, held, head * held->slots + begin - held->first, keys, parts);
        for (int64_t first = 0, now; first < count; first += now) {
            int64_t groups = (count - first + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
            now = (count - first + groups - 1) / groups;
            look_at_some(held, position, shared, first, now, begin, keys, size, parts);
        }
    }
    for (int64_t query = 0; query < count; query++) {
        float *out = work.attended + (row + query / shared) * work.attended_width + (head * shared + query % shared) * size;
        float whole = 1 / parts.total[query];
        for (int64_t i = 0; i < size; i++) out[i] = parts.sums[query * parts.width + i] * whole;
    }
}

/* How many rows, of one session or several, are looked at as one piece. */
always int64_t rows_of_a_look(const Step *step, const Block *block) {
    int64_t shared = block->query_heads / block->key_heads, most = shared < QUERIES ? QUERIES / shared : 1;
    int64_t parts = (step->row_count + most - 1) / most;
    return (step->row_count + parts - 1) / parts;
}

static void look_of_many(const Step *step, const Block *block, Work work, int64_t index, int64_t from, int64_t to, float *scratch) {
    int64_t each = rows_of_a_look(step, block), pieces = (step->row_count + each - 1) / each;
    for (int64_t which = from; which < to; which++) {
        /* The last tokens, which see most, first: so threads end at the same time. */
        int64_t row = (pieces - 1 - which / block->key_heads) * each, head = which % block->key_heads;
        int64_t last = row + each < step->row_count ? row + each : step->row_count;
        for (int64_t end; row < last; row = end) {
            for (end = row + 1; end < last && step->rows[end].held == step->rows[row].held;) end++;
            if (end - row == 1 || block->query_heads > QUERIES * block->key_heads)
                for (int64_t one = row; one < end; one++) look(step, block, work, index, one * block->key_heads + head, one * block->key_heads + head + 1);
            else look_together(step, block, work, index, row, end - row, head, scratch);
        }
    }
}

/* Puts numbers where a session holds them, from an index on; in 16 bits to the nearest, of two the even one. */
static void keep(const float *from, int64_t size, void *to, int64_t index, int kind) {
    if (kind == FLOAT32) {
        __builtin_memcpy((float *)to + index, from, size * sizeof *from);
        return;
    }
    for (int64_t i = 0; i < size; i++) {
        union { float value; uint32_t bits; } one = {.value = from[i]};
        uint32_t rounded = (one.bits + 0x7fff + (one.bits >> 16 & 1)) >> 16;
        ((uint16_t *)to)[index + i] = from[i] == from[i] ? (uint16_t)rounded : 0x7fc0;
    }
}

/* Norms and rotates the heads [from, to) of queries and keys of all rows, and keeps keys and values. */
static void settle(const Step *step, const Block *block, Work work, int64_t index, int64_t from, int64_t to) {
    int64_t size = block->size, queries = block->query_heads, heads = queries + block->key_heads;
    for (int64_t which = from; which < to; which++) {
        int64_t row = which / heads, head = which % heads;
        float *states = work.states + row * work.states_width, *one = states + head * size;
        const float *norm = head < queries ? block->query_norm : block->key_norm;
        if (norm) rms_norm(one, norm, head < queries ? block->query_eps : block->key_eps, size, one);
        if (block->turns) {
            int64_t angle = step->rows[row].angle * step->turning;
            turn(one, step->cosines + angle, step->sines + angle, step->turning);
        }
        if (head >= queries) {
            const Held *held = step->rows[row].held + step->first + index;
            int64_t place = ((head - queries) * held->slots + step->rows[row].position - held->first) * size;
            keep(one, size, held->keys, place, block->kept);
            keep(one + (int64_t)block->key_heads * size, size, held->values, place, block->kept);
        }
    }
}

apart void gate_and_up(const Step *step, const Block *block, Work work, int64_t from, int64_t to) {
    float gates[MOST_ROWS][PANEL], ups[MOST_ROWS][PANEL];
    for (int64_t first = from, count; first < to; first += count) {
        count = of_panel(first, to);
        of_layer(&block->gate, first, work.normed, work.sums, step->row_count, count, gates);
        of_layer(&block->up, first, work.normed, work.sums, step->row_count, count, ups);
        for (int64_t row = 0; row < step->row_count; row++) {
            float gate[PANEL] = {0}, up[PANEL];
            for (int64_t i = 0; i < count; i++) {
                gate[i] = gates[row][i] + (block->gate.bias ? block->gate.bias[first + i] : 0);
                up[i] = ups[row][i] + (block->up.bias ? block->up.bias[first + i] : 0);
            }
            for (int i = 0; i < PANEL; i += LANES) {
                lanes value = load(gate + i), active = value / (1 + exponential(-value));
                __builtin_memcpy(gate + i, &active, sizeof active);
            }
            for (int64_t i = 0; i < count; i++) work.activated[row * work.activated_width + first + i] = gate[i] * up[i];
        }
    }
}

/* value = SiLU(value) * factor for LANES of them. */
always void activate(float *value, const float *factor) {
    lanes gate = load(value), active = gate / (1 + exponential(-gate)) * load(factor);
    __builtin_memcpy(value, &active, sizeof active);
}

/* The same for many rows. */
static void gate_and_up_of_many(const Step *step, const Block *block, Work work, int64_t from, int64_t to, float *scratch) {
    float *ups = scratch + DEEP * WIDE;
    for (int64_t first = from; first < to; first += WIDE) {
        int64_t count = to - first < WIDE ? to - first : WIDE, rows = step->row_count;
        float *gates = work.activated + first;
        linear_of_many(&block->gate, work.normed, work.normed_width, rows, first, first + count, gates, work.activated_width, 0, scratch);
        linear_of_many(&block->up, work.normed, work.normed_width, rows, first, first + count, ups, WIDE, 0, scratch);
        for (int64_t row = 0; row < rows; row++) {
            float gate[WIDE] = {0}, *place = gates + row * work.activated_width;
            __builtin_memcpy(gate, place, count * sizeof *gate);
            for (int64_t i = 0; i < WIDE; i += LANES) activate(gate + i, ups + row * WIDE + i);
            __builtin_memcpy(place, gate, count * sizeof *gate);
        }
    }
}

/* How much a stage has to do, of whatever it counts. */
static int64_t stage_size(const Step *step, int64_t index, int stage) {
    const Block *block = step->blocks + index;
    int many = step->row_count > MOST_ROWS;
    int64_t unit = many ? WIDE : 1;
    switch (stage) {
        case 0: return multiple(block->queries.outputs, unit) + multiple(block->keys.outputs, unit) + multiple(block->values.outputs, unit);
        case 1: return step->row_count * (block->query_heads + block->key_heads);
        case 2: {
            int64_t each = many ? rows_of_a_look(step, block) : 1;
            return (step->row_count + each - 1) / each * block->key_heads;
        }
        case 3: return block->out.outputs;
        case 4: return block->gate.outputs;
        case 5: return block->down.outputs;
        default: return step->head->outputs;
    }
}

static void compute(const Step *step, int64_t index, int stage, int64_t from, int64_t to, int64_t thread) {
    int many = step->row_count > MOST_ROWS;
    if (stage == HEAD && many) {
        linear_of_many(step->head, step->hidden, step->width, step->row_count, from, to, step->outputs + from, step->head->outputs, 0, step->work + thread * DEEP * WIDE);
        return;
    }
    if (stage == HEAD) {
        linear(step->head, step->hidden, step->work, step->row_count, from, to, step->outputs, step->head->outputs, 0);
        return;
    }
    const Block *block = step->blocks + index;
    Work work = work_of(step, block);
    float *scratch = work.own + thread * work.scratch;
    switch (stage) {
        case 0: project(step, block, work, from, to, scratch); break;
        case 1: settle(step, block, work, index, from, to); break;
        case 2: many ? look_of_many(step, block, work, index, from, to, scratch) : look(step, block, work, index, from, to); break;
        case 3: add(step, &block->out, work.attended, work.attended_width, work, from, to, scratch); break;
        case 4: many ? gate_and_up_of_many(step, block, work, from, to, scratch) : gate_and_up(step, block, work, from, to); break;
        default: add(step, &block->down, work.activated, work.activated_width, work, from, to, scratch);
    }
}

static void norm_rows(const Step *step, int64_t index, const float *weight, float eps) {
    Work work = work_of(step, step->blocks + index);
    for (int64_t row = 0; row < step->row_count; row++)
        rms_norm(step->hidden + row * step->width, weight, eps, step->width, work.normed + row * work.normed_width);
    if (step->row_count <= MOST_ROWS) sum_groups(work.normed, step->row_count, step->width, work.sums);
}

/* What one thread alone does when a stage is complete, before the others go on. */
static void between(const Step *step, int64_t index, int stage) {
    if (stage == HEAD) return;
    const Block *block = step->blocks + index;
    Work work = work_of(step, block);
    int few = step->row_count <= MOST_ROWS;
    if (stage == 2 && few && block->out.kind == INT4) sum_groups(work.attended, step->row_count, work.attended_width, work.sums);
    if (stage == 4 && few && block->down.kind == INT4) sum_groups(work.activated, step->row_count, work.activated_width, work.sums);
    if (stage == 3) norm_rows(step, index, step->blocks[index].mlp_norm, step->blocks[index].mlp_eps);
    if (stage == 5 && index + 1 < step->count) norm_rows(step, index + 1, step->blocks[index + 1].norm, step->blocks[index + 1].eps);
}

static void take_part_in(Step *step, int64_t index, int stage, int64_t thread) {
    int64_t size = stage_size(step, index, stage), pieces = step->threads == 1 ? 1 : step->threads * PIECES;
    int64_t each = (size + pieces - 1) / pieces;
    int64_t many = step->row_count > MOST_ROWS, unit = stage == 1 || stage == 2 ? 1 : many ? WIDE : PANEL;
    each = many && each > unit ? each / unit * unit : multiple(each, unit); /* of many rows, WIDE outputs are much work */
    pieces = (size + each - 1) / each;
    _Atomic int32_t *taken = &step->stages[index * STAGES + stage % HEAD].taken, *done = &step->stages[index * STAGES + stage % HEAD].done;
    for (;;) {
        int64_t piece = atomic_fetch_add_explicit(taken, 1, memory_order_relaxed);
        if (piece >= pieces) break;
        int64_t from = piece * each, to = from + each < size ? from + each : size;
        compute(step, index, stage, from, to, thread);
        if (atomic_fetch_add_explicit(done, 1, memory_order_acq_rel) == pieces - 1) {
            between(step, index, stage);
            atomic_store_explicit(done, COMPLETE, memory_order_release);
        }
    }
    for (int looks = 0; atomic_load_explicit(done, memory_order_acquire) != COMPLETE; looks++) {
        if (looks < AWAKE) pause_a_moment();
        else give_way();
    }
}

/* thread: each has another number, the caller's is 0. */
static void take_part(Step *step, int64_t thread) {
    for (int64_t index = 0; index < step->count; index++)
        for (int stage = 0; stage < STAGES; stage++) take_part_in(step, index, stage, thread);
    if (step->head) take_part_in(step, step->count, HEAD, thread);
}

/* The steps in work, on the board: only who holds it may look at them. */
static Step *steps;

/* Helps with every step that wants it, and never returns. */
EXPORT void petals_help(void) {
    take_board();
    for (;;) {
        Step *step = steps;
        while (step && !step->wanted) step = step->next;
        if (!step) {
            wait_for_news();
            continue;
        }
        int64_t thread = ++step->came;
        step->wanted--;
        atomic_fetch_add(&step->inside, 1);
        leave_board();
        take_part(step, thread);
        atomic_fetch_sub(&step->inside, 1); /* from here on the step may be gone */
        take_board();
    }
}

/* Computes the step, with the help of `threads` - 1 others as far as they come. `stages` are all zero. Each thread has a part of `work` by its number. */
EXPORT void petals_step(Step *step) {
    if (step->count) norm_rows(step, 0, step->blocks[0].norm, step->blocks[0].eps);
    else if (step->head->kind == INT4 && step->row_count <= MOST_ROWS) sum_groups(step->hidden, step->row_count, step->head->inputs, step->work);
    step->came = 0, step->wanted = step->threads - 1;
    atomic_store(&step->inside, 0);
    if (step->wanted) {
        take_board();
        step->next = steps, steps = step;
        leave_board();
        for (int64_t i = 0; i < step->threads - 1; i++) tell_one();
    }
    take_part(step, 0);
    if (step->threads == 1) return;
    take_board();
    Step **place = &steps;
    while (*place != step) place = &(*place)->next;
    *place = step->next;
    leave_board();
    while (atomic_load(&step->inside)) give_way();
}

/* A weight in INT4 or INT8 as numbers of another kind, [groups, GROUP, panels, PANEL]: its columns one after the other. */
EXPORT void petals_unpack(const void *weight, int from, int64_t panels, int64_t groups, void *to, int kind) {
    for (int64_t which = 0; which < panels; which++)
        for (int64_t group = 0; group < groups; group++) {
            float values[GROUP][PANEL];
            if (from == INT4) values_of((const Panel *)weight + which * groups + group, values[0], PANEL);
            else values_of8((const Panel8 *)weight + which * groups + group, values[0], PANEL);
            for (int i = 0; i < GROUP; i++) keep(values[i], PANEL, to, ((group * GROUP + i) * panels + which) * PANEL, kind);
        }
}

/* Lane by lane one or the other. */
always lanes chosen(whole where, lanes yes, lanes no) {
    union { lanes value; whole bits; } a = {.value = yes}, b = {.value = no};
    a.bits = (a.bits & where) | (b.bits & ~where);
    return a.value;
}

typedef _Float16 half_lanes __attribute__((vector_size(LANES * 2), aligned(2)));

/* A scale and a least value, as a Panel keeps them, for GROUP inputs of LANES outputs; the sum of the squares by which the nearest levels are off,
   and what would be best for these levels. */
typedef struct {
    lanes scale, least, error, better_scale, better_least;
} Fit;

always lanes kept(lanes value) { return __builtin_convertvector(__builtin_convertvector(value, half_lanes), lanes); }

/* The level of a value that is so many steps from level 0. */
always lanes level_of(lanes steps) {
    steps = __builtin_elementwise_min(__builtin_elementwise_max(steps, (lanes){0}), (lanes){0} + 15);
    return (steps + 12582912.0f) - 12582912.0f; /* 1.5 x 2^23: what is behind the point falls off */
}

always Fit fit(float values[][WIDE], lanes scale, lanes least) {
    scale = kept(scale), least = kept(least);
    scale = chosen(scale == 0, (lanes){0} + 1, scale);
    lanes each = 1 / scale, first = -least * each, error = {0}, levels = {0}, squares = {0}, products = {0}, sum = {0};
#pragma unroll 8
    for (int i = 0; i < GROUP; i++) {
        lanes value = load(values[i]), level = level_of(value * each + first), off = level * scale + (least - value);
        error += off * off, levels += level, squares += level * level, products += level * value, sum += value;
    }
    const float share = 1.0f / GROUP;
    lanes spread = squares - levels * levels * share;
    lanes better_scale = chosen(spread > 0, (products - levels * sum * share) / spread, scale);
    return (Fit){scale, least, error, better_scale, (sum - better_scale * levels) * share};
}

always Fit better(Fit one, Fit other) {
    whole wins = other.error < one.error;
    return (Fit){chosen(wins, other.scale, one.scale), chosen(wins, other.least, one.least), chosen(wins, other.error, one.error),
                 chosen(wins, other.better_scale, one.better_scale), chosen(wins, other.better_least, one.better_least)};
}

/* How many steps the range of a group's values may be. Values that lie on levels already do not always use all of them. */
static const float steps_between[] = {15, 14, 13};
#define RANGES (int)(sizeof steps_between / sizeof *steps_between)

/* Of a scale and a least value, and what is best for their levels. */
always Fit better_of(float values[][WIDE], lanes scale, lanes least) {
    Fit one = fit(values, scale, least);
    return better(one, fit(values, one.better_scale, one.better_least));
}

/* Of GROUP inputs the outputs from `part` on of a panel. Returns how far they are off, which is no number where a value is none, or too large. */
apart lanes quantize_group(float values[][WIDE], Panel *to, int part) {
    lanes low = load(values[0]), high = low;
    for (int i = 1; i < GROUP; i++) {
        low = __builtin_elementwise_min(low, load(values[i]));
        high = __builtin_elementwise_max(high, load(values[i]));
    }
    lanes range = high - low, farthest = chosen(high > -low, high, low);
    Fit best;
    for (int i = 0; i <= RANGES; i++) {
        /* Values that lay on levels on both sides of nothing had the one farthest from it at level 0. */
        Fit one = i < RANGES ? better_of(values, range / steps_between[i], low) : better_of(values, farthest * -0.125f, farthest);
        best = i ? better(best, one) : one;
    }
    best = better(best, fit(values, best.better_scale, best.better_least));
    half_lanes scale = __builtin_convertvector(best.scale, half_lanes), least = __builtin_convertvector(best.least, half_lanes);
    __builtin_memcpy(to->scales + part, &scale, sizeof scale);
    __builtin_memcpy(to->leasts + part, &least, sizeof least);
    lanes each = 1 / best.scale, first = -best.least * each;
    for (int i = 0; i < GROUP / 2; i++) {
        typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1)));
        lanes lower = level_of(load(values[i]) * each + first), upper = level_of(load(values[i + GROUP / 2]) * each + first);
        bytes both = __builtin_convertvector(__builtin_convertvector(lower + 16 * upper, whole), bytes);
        __builtin_memcpy(to->levels[i] + part, &both, sizeof both);
    }
    return best.error;
}

/* Quantizes a weight's first rows, and zeros behind them, to panels in INT4. scratch: as petals_many_floats() says for one thread. Returns
   whether all of its values are numbers that can be kept so. */
EXPORT int petals_quantize(const void *weight, int kind, int64_t rows, int64_t columns, int64_t panels, void *to, float *scratch) {
    const Linear layer = {.weight = weight, .outputs = rows, .inputs = columns, .kind = kind};
    float(*values)[WIDE] = (float(*)[WIDE])scratch;
    lanes off = {0};
    for (int64_t first = 0; first < panels * PANEL; first += WIDE)
        for (int64_t begin = 0; begin < columns; begin += DEEP) {
            int64_t deep = columns - begin < DEEP ? columns - begin : DEEP;
            (kind == FLOAT32 ? columns_of_float32 : columns_of_bfloat16)(&layer, first, rows - first, begin, deep, values);
            for (int64_t side = 0; side < WIDE && first + side < panels * PANEL; side += PANEL) {
                Panel *panel = (Panel *)to + (first + side) / PANEL * (columns / GROUP) + begin / GROUP;
                for (int64_t group = 0; group < deep / GROUP; group++)
                    for (int part = 0; part < PANEL; part += LANES)
                        off += quantize_group((float(*)[WIDE])&values[group * GROUP][side + part], panel + group, part);
            }
        }
    float total = sum(off);
    return total - total == 0;
}
