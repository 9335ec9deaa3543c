/* A native runtime in miniature: a program of its own over a real model, which knows nothing of petals-win.

       llama MODEL --jsonl                                        answers lines of JSON (docs/command-engine.md), four at once
       llama MODEL [-n TOKENS] [--temp NUMBER] [--seed NUMBER]    answers the text on its standard input, and ends

   The model is a small Llama in float32, in a file that tests/engines/native_runtime.py writes. Its tokens are single characters of one
   byte and, below `controls`, control tokens: of these, the first ones are padding, begin, end, and the turns of user and assistant. */

#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _WIN32
#include <corecrt_startup.h>
#include <io.h>
#include <windows.h>
#define read _read
#else
#include <poll.h>
#include <unistd.h>
#endif

enum { AT_ONCE = 4, LONGEST_ID = 400, BEGIN = 1, TURN_ENDS = 2, USER = 3, ASSISTANT = 4 };

#ifdef _WIN32
/* Windows' own C library, for which no file of the compiler's has to be built, has printf by another name. */
static int say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = __stdio_common_vfprintf(0, stdout, format, NULL, arguments);
    va_end(arguments);
    return length;
}
#define printf say
#endif

static void fail(const char *why) {
    fputs(why, stderr), fputs("\n", stderr);
    exit(2);
}

static void *room_for(size_t bytes) {
    void *memory = calloc(bytes ? bytes : 1, 1);
    if (!memory) fail("there is no memory left");
    return memory;
}

/* ---- the model ---- */

typedef struct {
    const float *norm_before, *q, *k, *v, *o, *norm_after, *gate, *up, *down;
} Layer;

static struct {
    int32_t vocabulary, hidden, layers, heads, kv_heads, head_size, inner, context, controls, end;
    float epsilon, theta;
} head;
static char **texts;      /* of each token */
static int by_byte[256];  /* the token of a byte, -1 if there is none */
static const float *embedding, *last_norm, *unembedding;
static Layer *layers;

static void read_all(FILE *file, void *into, size_t bytes) {
    if (fread(into, 1, bytes, file) != bytes) fail("the model's file ends too early");
}

static const float *take(FILE *file, size_t count) {
    float *numbers = room_for(count * sizeof(float));
    read_all(file, numbers, count * sizeof(float));
    return numbers;
}

static void load(const char *path) {
    FILE *file = fopen(path, "rb");
    char magic[4];
    if (!file) fail("there is no such model");
    read_all(file, magic, 4);
    if (memcmp(magic, "TINY", 4)) fail("this is no file of a model");
    read_all(file, &head, sizeof head);
    memset(by_byte, -1, sizeof by_byte);
    texts = room_for(head.vocabulary * sizeof *texts);
    for (int token = 0; token < head.vocabulary; token++) {
        int32_t length;
        read_all(file, &length, sizeof length);
        texts[token] = room_for((size_t)length + 1);
        read_all(file, texts[token], length);
        if (token >= head.controls && length == 1) by_byte[(unsigned char)texts[token][0]] = token;
    }
    size_t wide = head.hidden, queries = (size_t)head.heads * head.head_size, keys = (size_t)head.kv_heads * head.head_size;
    embedding = take(file, head.vocabulary * wide);
    layers = room_for(head.layers * sizeof *layers);
    for (int number = 0; number < head.layers; number++) {
        Layer *layer = &layers[number];
        layer->norm_before = take(file, wide);
        layer->q = take(file, queries * wide);
        layer->k = take(file, keys * wide);
        layer->v = take(file, keys * wide);
        layer->o = take(file, wide * queries);
        layer->norm_after = take(file, wide);
        layer->gate = take(file, head.inner * wide);
        layer->up = take(file, head.inner * wide);
        layer->down = take(file, wide * head.inner);
    }
    last_norm = take(file, wide);
    unembedding = take(file, head.vocabulary * wide);
    fclose(file);
}

static void multiply(float *out, const float *matrix, const float *in, int rows, int columns) {
    for (int row = 0; row < rows; row++) {
        float sum = 0;
        for (int column = 0; column < columns; column++) sum += matrix[(size_t)row * columns + column] * in[column];
        out[row] = sum;
    }
}

static void normalize(float *out, const float *in, const float *weight) {
    float squares = 0;
    for (int i = 0; i < head.hidden; i++) squares += in[i] * in[i];
    float scale = 1 / sqrtf(squares / head.hidden + head.epsilon);
    for (int i = 0; i < head.hidden; i++) out[i] = weight[i] * (in[i] * scale);
}

static void rotate(float *vectors, int count, int position) {
    int half = head.head_size / 2;
    for (int vector = 0; vector < count; vector++, vectors += head.head_size) {
        for (int i = 0; i < half; i++) {
            float angle = position * powf(head.theta, -2.0f * i / head.head_size);
            float one = vectors[i], other = vectors[i + half];
            vectors[i] = one * cosf(angle) - other * sinf(angle);
            vectors[i + half] = other * cosf(angle) + one * sinf(angle);
        }
    }
}

/* ---- answers ---- */

typedef struct {
    char id[LONGEST_ID]; /* as JSON */
    int runs, cancelled;
    int *tokens, length, prompt, limit; /* `length` tokens are in the caches */
    int next;                           /* which is chosen, and not in the caches yet */
    float temperature;
    uint64_t drawn;
    float *keys, *values; /* [layers, context, kv_heads * head_size] */
} Answer;

static Answer answers[AT_ONCE];

static void attend(const Answer *answer, int layer, const float *queries, float *out) {
    static float *weights;
    if (!weights) weights = room_for(head.context * sizeof(float));
    size_t row = (size_t)head.kv_heads * head.head_size, begin = (size_t)layer * head.context * row;
    for (int number = 0; number < head.heads; number++) {
        const float *query = queries + (size_t)number * head.head_size;
        size_t part = (size_t)(number / (head.heads / head.kv_heads)) * head.head_size;
        float most = -INFINITY, sum = 0;
        for (int at = 0; at <= answer->length; at++) {
            const float *key = answer->keys + begin + at * row + part;
            float product = 0;
            for (int i = 0; i < head.head_size; i++) product += query[i] * key[i];
            weights[at] = product / sqrtf((float)head.head_size);
            if (weights[at] > most) most = weights[at];
        }
        for (int at = 0; at <= answer->length; at++) sum += weights[at] = expf(weights[at] - most);
        float *into = out + (size_t)number * head.head_size;
        memset(into, 0, head.head_size * sizeof(float));
        for (int at = 0; at <= answer->length; at++) {
            const float *value = answer->values + begin + at * row + part;
            for (int i = 0; i < head.head_size; i++) into[i] += weights[at] / sum * value[i];
        }
    }
}

/* Compute one token at the end of an answer; `logits`, unless it is NULL, gets what may follow. */
static void step(Answer *answer, int token, float *logits) {
    static float *state, *normal, *queries, *mixed, *added, *gate, *up;
    if (!state) {
        size_t wide = head.hidden, heads = (size_t)head.heads * head.head_size, inner = head.inner;
        state = room_for((3 * wide + 2 * heads + 2 * inner) * sizeof(float));
        normal = state + wide, added = normal + wide, queries = added + wide, mixed = queries + heads;
        gate = mixed + heads, up = gate + inner;
    }
    int position = answer->length, row = head.kv_heads * head.head_size;
    memcpy(state, embedding + (size_t)token * head.hidden, head.hidden * sizeof(float));
    for (int number = 0; number < head.layers; number++) {
        const Layer *layer = &layers[number];
        size_t place = ((size_t)number * head.context + position) * row;
        normalize(normal, state, layer->norm_before);
        multiply(queries, layer->q, normal, head.heads * head.head_size, head.hidden);
        multiply(answer->keys + place, layer->k, normal, row, head.hidden);
        multiply(answer->values + place, layer->v, normal, row, head.hidden);
        rotate(queries, head.heads, position);
        rotate(answer->keys + place, head.kv_heads, position);
        attend(answer, number, queries, mixed);
        multiply(added, layer->o, mixed, head.hidden, head.heads * head.head_size);
        for (int i = 0; i < head.hidden; i++) state[i] += added[i];
        normalize(normal, state, layer->norm_after);
        multiply(gate, layer->gate, normal, head.inner, head.hidden);
        multiply(up, layer->up, normal, head.inner, head.hidden);
        for (int i = 0; i < head.inner; i++) up[i] *= gate[i] / (1 + expf(-gate[i]));
        multiply(added, layer->down, up, head.hidden, head.inner);
        for (int i = 0; i < head.hidden; i++) state[i] += added[i];
    }
    answer->tokens[answer->length++] = token;
    if (logits) {
        normalize(normal, state, last_norm);
        multiply(logits, unembedding, normal, head.vocabulary, head.hidden);
    }
}

static double between_0_and_1(Answer *answer) {
    answer->drawn ^= answer->drawn >> 12, answer->drawn ^= answer->drawn << 25, answer->drawn ^= answer->drawn >> 27;
    return (double)((answer->drawn * 2685821657736338717ull) >> 11) / 9007199254740992.0;
}

/* The likeliest token, or one by chance; of control tokens only the end. */
static int choose(Answer *answer, const float *logits) {
    int best = -1;
    double sum = 0;
    for (int token = 0; token < head.vocabulary; token++) {
        if (token < head.controls && token != head.end) continue;
        if (best < 0 || logits[token] > logits[best]) best = token;
    }
    if (answer->temperature <= 0) return best;
    for (int pass = 0, token; pass < 2; pass++) {
        double left = pass ? between_0_and_1(answer) * sum : 0;
        for (token = 0; token < head.vocabulary; token++) {
            if (token < head.controls && token != head.end) continue;
            double weight = exp((logits[token] - logits[best]) / answer->temperature);
            if (!pass) sum += weight;
            else if ((left -= weight) < 0) return token;
        }
    }
    return best;
}

/* Append the tokens of a text; its control tokens are ones if `controls`. What the model does not know is left out. */
static int put_text(int *tokens, int length, const char *text, int controls) {
    while (*text) {
        int token = 0;
        while (token < (controls ? head.controls : 0) && strncmp(text, texts[token], strlen(texts[token]))) token++;
        if (controls && token < head.controls) {
            text += strlen(texts[token]);
        } else {
            token = by_byte[(unsigned char)*text++];
            if (token < 0) continue;
        }
        if (length <= head.context) tokens[length] = token; /* one more than fits is enough to know that it does not */
        length++;
    }
    return length;
}

/* Read the prompt, of `prompt` tokens, and choose the first token of the answer. */
static void begin(Answer *answer, const int *tokens, int most, float temperature, uint64_t seed) {
    size_t caches = (size_t)head.layers * head.context * head.kv_heads * head.head_size * sizeof(float);
    static float *logits;
    if (!logits) logits = room_for(head.vocabulary * sizeof(float));
    if (!answer->keys) {
        answer->keys = room_for(caches), answer->values = room_for(caches);
        answer->tokens = room_for(head.context * sizeof(int));
    }
    int room = head.context - answer->prompt;
    answer->limit = most > 0 && most < room ? most : room;
    answer->runs = 1, answer->cancelled = 0, answer->length = 0;
    answer->temperature = temperature, answer->drawn = seed * 0x9E3779B97F4A7C15ull + 0x2545F4914F6CDD1Dull;
    for (int at = 0; at < answer->prompt; at++) step(answer, tokens[at], at == answer->prompt - 1 ? logits : NULL);
    answer->next = choose(answer, logits);
}

/* The next token that is said, -1 at the end. */
static int advance(Answer *answer) {
    static float *logits;
    if (!logits) logits = room_for(head.vocabulary * sizeof(float));
    int said = answer->next;
    if (said == head.end || answer->limit-- <= 0) return -1;
    if (answer->limit > 0) {
        step(answer, said, logits);
        answer->next = choose(answer, logits);
    }
    return said;
}

/* ---- JSON, as far as it is needed: values are looked at where they stand ---- */

static const char *past_blanks(const char *at) {
    while (*at == ' ' || *at == '\t' || *at == '\r' || *at == ',' || *at == ':') at++;
    return at;
}

static const char *past_value(const char *at) {
    int depth = 0;
    do {
        at = past_blanks(at);
        if (*at == '"') {
            for (at++; *at && *at != '"'; at++)
                if (*at == '\\' && at[1]) at++;
            if (*at) at++;
        } else if (*at == '{' || *at == '[') {
            depth++, at++;
        } else if (*at == '}' || *at == ']') {
            depth--, at++;
        } else {
            while (*at && !strchr(",:}] \t\r", *at)) at++;
        }
    } while (depth > 0 && *at);
    return at;
}

/* The value of a name in an object, NULL if it has none. */
static const char *member(const char *object, const char *name) {
    if (!object || *object != '{') return NULL;
    for (const char *at = past_blanks(object + 1); *at == '"'; at = past_blanks(past_value(at))) {
        const char *end = past_value(at), *value = past_blanks(end);
        if ((size_t)(end - at) == strlen(name) + 2 && !strncmp(at + 1, name, strlen(name))) return value;
        at = value;
    }
    return NULL;
}

static unsigned hexadecimal(const char *at) {
    char digits[5] = {0};
    strncpy(digits, at, 4);
    return (unsigned)strtoul(digits, NULL, 16);
}

/* The text of a string, in UTF-8, which lives until the program ends it by free(). */
static char *text_of(const char *at) {
    char *text = room_for(at && *at == '"' ? (size_t)(past_value(at) - at) + 4 : 1), *into = text;
    if (!at || *at != '"') return text;
    for (at++; *at && *at != '"'; at++) {
        if (*at != '\\') {
            *into++ = *at;
        } else if (*++at == 'u') {
            unsigned code = hexadecimal(at + 1);
            at += 4;
            if (code >= 0xD800 && code < 0xDC00 && at[1] == '\\') {
                code = 0x10000 + ((code - 0xD800) << 10) + (hexadecimal(at + 3) - 0xDC00);
                at += 6;
            }
            if (code < 0x80) {
                *into++ = (char)code;
            } else {
                int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
                *into++ = (char)((0xFF00 >> (more + 1) & 0xFF) | code >> 6 * more);
                while (more--) *into++ = (char)(0x80 | (code >> 6 * more & 0x3F));
            }
        } else {
            const char *named = strchr("n\nt\tr\rb\bf\f", *at);
            *into++ = named ? named[1] : *at;
        }
    }
    return text;
}

static int is(const char *value, const char *text) {
    char *said = text_of(value);
    int same = !strcmp(said, text);
    free(said);
    return same;
}

static double number(const char *value, double otherwise) {
    return value && strchr("-0123456789", *value) ? strtod(value, NULL) : otherwise;
}

/* ---- the dialect "jsonl" ---- */

static void say_token(const Answer *answer, int token) {
    printf("{\"type\": \"token\", \"id\": %s, \"text\": \"", answer->id);
    for (const char *at = token < head.controls ? "" : texts[token]; *at; at++)
        printf(*at == '"' || *at == '\\' ? "\\%c" : (unsigned char)*at < 32 ? "\\u%04x" : "%c", *at);
    printf("\"}\n");
}

static int *tokens_of(const char *asked, int *length) {
    int *tokens = room_for(((size_t)head.context + 1) * sizeof(int)), count = 0;
    const char *messages = member(asked, "messages");
    if (!messages) {
        char *text = text_of(member(asked, "text"));
        count = put_text(tokens, 0, text, 1);
        free(text);
    } else {
        const int room = head.context + 1;
        tokens[count++] = BEGIN;
        for (const char *at = past_blanks(messages + 1); *at == '{'; at = past_blanks(past_value(at))) {
            char *text = text_of(member(at, "content"));
            if (count < room) tokens[count] = is(member(at, "role"), "assistant") ? ASSISTANT : USER;
            count = put_text(tokens, count + 1, text, 0);
            if (count < room) tokens[count] = TURN_ENDS;
            count++;
            free(text);
        }
        if (count < room) tokens[count] = ASSISTANT;
        count++;
    }
    *length = count;
    return tokens;
}

static void generate(const char *asked) {
    Answer *answer = answers;
    while (answer < answers + AT_ONCE && answer->runs) answer++;
    const char *id = member(asked, "id"), *options = member(asked, "options");
    size_t length = id ? (size_t)(past_value(id) - id) : LONGEST_ID;
    if (length >= LONGEST_ID || answer == answers + AT_ONCE) fail("this was not agreed on");
    memcpy(answer->id, id, length), answer->id[length] = 0;
    int *tokens = tokens_of(asked, &answer->prompt);
    if (answer->prompt < 1 || answer->prompt >= head.context) {
        const char *kind = answer->prompt < 1 ? "refused" : "context";
        printf("{\"type\": \"error\", \"id\": %s, \"kind\": \"%s\", \"prompt_tokens\": %d, ", answer->id, kind, answer->prompt);
        printf("\"message\": \"The prompt is empty, or too long.\"}\n");
    } else {
        double seed = number(member(options, "seed"), (double)time(NULL) + (double)clock());
        printf("{\"type\": \"started\", \"id\": %s, \"prompt_tokens\": %d}\n", answer->id, answer->prompt);
        begin(answer, tokens, (int)number(member(asked, "max_tokens"), 0), (float)number(member(options, "temperature"), 1), (uint64_t)seed);
    }
    free(tokens);
}

static void handle(const char *line) {
    const char *type = member(line, "type"), *id = member(line, "id");
    if (is(type, "hello")) {
        printf("{\"type\": \"hello\", \"version\": 1, \"inputs\": [\"messages\", \"text\"], \"options\": [\"seed\"], \"at_once\": %d}\n", AT_ONCE);
    } else if (is(type, "load")) {
        const char *name = member(line, "model");
        printf("{\"type\": \"loaded\", \"model\": %.*s, \"context_length\": %d}\n", (int)(past_value(name) - name), name, head.context);
    } else if (is(type, "generate")) {
        generate(line);
    } else if (is(type, "ping")) {
        printf("{\"type\": \"pong\"}\n");
    } else if (is(type, "cancel") && id) {
        for (Answer *answer = answers; answer < answers + AT_ONCE; answer++)
            if (answer->runs && !strncmp(answer->id, id, strlen(answer->id))) answer->cancelled = 1;
    }
}

static void compute(void) {
    for (Answer *answer = answers; answer < answers + AT_ONCE; answer++) {
        if (!answer->runs) continue;
        int token = answer->cancelled ? -1 : advance(answer);
        if (token >= 0) {
            say_token(answer, token);
        } else {
            const char *reason = answer->cancelled ? "cancelled" : answer->limit < 0 ? "length" : "stop";
            printf("{\"type\": \"done\", \"id\": %s, \"reason\": \"%s\"}\n", answer->id, reason);
            answer->runs = 0;
        }
    }
}

static int input_waits(void) {
#ifdef _WIN32
    DWORD bytes = 0;
    return !PeekNamedPipe(GetStdHandle(STD_INPUT_HANDLE), NULL, 0, NULL, &bytes, NULL) || bytes;
#else
    struct pollfd input = {0, POLLIN, 0};
    return poll(&input, 1, 0) != 0;
#endif
}

/* Append what is on standard input; 0 at its end. */
static int read_more(char **text, size_t *length) {
    *text = realloc(*text, *length + 65537);
    if (!*text) fail("there is no memory left");
    int got = (int)read(0, *text + *length, 65536);
    if (got > 0) *length += got;
    (*text)[*length] = 0;
    return got > 0;
}

static int answer_lines(void) {
    char *text = NULL, *end;
    size_t length = 0;
    for (;;) {
        int busy = 0;
        for (int i = 0; i < AT_ONCE; i++) busy |= answers[i].runs;
        if (!busy || input_waits()) {
            if (!read_more(&text, &length)) return 0;
            while ((end = memchr(text, '\n', length))) {
                *end = 0;
                handle(text);
                length -= end + 1 - text;
                memmove(text, end + 1, length + 1);
            }
        }
        compute();
        fflush(stdout);
    }
}

/* ---- the dialect "cli" ---- */

static int answer_once(int count, char **arguments) {
    char *text = NULL;
    size_t length = 0;
    int most = 0, token, *tokens = room_for(((size_t)head.context + 1) * sizeof(int));
    float temperature = 1;
    uint64_t seed = (uint64_t)time(NULL);
    for (int i = 0; i + 1 < count; i += 2) {
        if (!strcmp(arguments[i], "-n")) most = atoi(arguments[i + 1]);
        else if (!strcmp(arguments[i], "--temp")) temperature = (float)atof(arguments[i + 1]);
        else if (!strcmp(arguments[i], "--seed")) seed = strtoull(arguments[i + 1], NULL, 10);
        else fail("there is no such option");
    }
    while (read_more(&text, &length)) {}
    Answer *answer = answers;
    answer->prompt = put_text(tokens, 0, text, 1);
    if (answer->prompt < 1 || answer->prompt >= head.context) fail("the prompt is empty, or too long");
    begin(answer, tokens, most, temperature, seed);
    while ((token = advance(answer)) >= 0) {
        if (token >= head.controls) fputs(texts[token], stdout);
        fflush(stdout);
    }
    return 0;
}

static int run(int count, char **arguments) {
#ifdef _WIN32
    _setmode(0, _O_BINARY), _setmode(1, _O_BINARY);
#endif
    if (count < 2) fail("the model's file is missing");
    load(arguments[1]);
    return count == 3 && !strcmp(arguments[2], "--jsonl") ? answer_lines() : answer_once(count - 2, arguments + 2);
}

#ifdef _WIN32
void mainCRTStartup(void) {
    _configure_narrow_argv(_crt_argv_unexpanded_arguments);
    exit(run(__argc, __argv));
}
#else
int main(int count, char **arguments) {
    return run(count, arguments);
}
#endif
