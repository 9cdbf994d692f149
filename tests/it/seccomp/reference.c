/* A filter as libseccomp makes it. Standard input, one command a line, numbers as libseccomp's own:
 *   default ACTION | arch TOKEN | rule ACTION NAME COUNT (ARGUMENT OPERATOR VALUE VALUE)... | number TOKEN NAME
 * Standard error: `unknown NAME` for names it does not know, `number TOKEN NAME N` for those asked for. Standard output:
 * the program, eight bytes an instruction. */
#include <errno.h>
#include <inttypes.h>
#include <seccomp.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int fail(const char *what, int error) {
    fprintf(stderr, "error %s: %s\n", what, strerror(-error));
    return 1;
}

int main(void) {
    scmp_filter_ctx filter = NULL;
    char word[16], name[64];
    uint32_t action, token;
    while (scanf("%15s", word) == 1) {
        if (strcmp(word, "default") == 0) {
            if (scanf("%" SCNu32, &action) != 1 || (filter = seccomp_init(action)) == NULL)
                return fail("default", -EINVAL);
        } else if (strcmp(word, "arch") == 0) {
            if (scanf("%" SCNu32, &token) != 1)
                return fail("arch", -EINVAL);
            int error = seccomp_arch_add(filter, token);
            if (error != 0 && error != -EEXIST)
                return fail("arch", error);
        } else if (strcmp(word, "number") == 0) {
            if (scanf("%" SCNu32 " %63s", &token, name) != 2)
                return fail("number", -EINVAL);
            fprintf(stderr, "number %" PRIu32 " %s %d\n", token, name, seccomp_syscall_resolve_name_arch(token, name));
        } else if (strcmp(word, "rule") == 0) {
            struct scmp_arg_cmp args[6];
            unsigned count, argument, operator;
            if (scanf("%" SCNu32 " %63s %u", &action, name, &count) != 3 || count > 6)
                return fail("rule", -EINVAL);
            for (unsigned i = 0; i < count; i++) {
                uint64_t value, second;
                if (scanf("%u %u %" SCNu64 " %" SCNu64, &argument, &operator, &value, &second) != 4)
                    return fail("argument", -EINVAL);
                args[i] = SCMP_CMP64(argument, operator, value, second);
            }
            int number = seccomp_syscall_resolve_name(name);
            if (number == __NR_SCMP_ERROR) {
                fprintf(stderr, "unknown %s\n", name);
                continue;
            }
            int error = seccomp_rule_add_array(filter, action, number, count, args);
            if (error != 0)
                return fail(name, error);
        } else {
            return fail(word, -EINVAL);
        }
    }
    int error = seccomp_export_bpf(filter, STDOUT_FILENO);
    return error == 0 ? 0 : fail("export", error);
}
