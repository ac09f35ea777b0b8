// What Python hands to a kernel: one struct of fields of 64 bits, and the declarations of them as a text, by which Python
// packs fields by name (ops/native/layout.py). So no order or count is agreed upon that nobody checks.
#pragma once
#include <cstdint>

struct Layout {
    const char* fields;
    int64_t bytes;
};

// PROBLEM(Name, fields): the struct, whose text is that of its fields.
#define PROBLEM(NAME, ...)                                      \
    struct NAME {                                               \
        __VA_ARGS__                                             \
    };                                                          \
    inline const Layout* layout_of(const NAME*) {               \
        static const Layout layout{#__VA_ARGS__, sizeof(NAME)}; \
        return &layout;                                         \
    }

// TELLS(name, Name): exports as `name_layout` what the exported kernel `name` takes. KERNEL(name, Name, function): exports
// the kernel too, which is function(const Name&).
#define TELLS(NAME, TAKES) \
    extern "C" const Layout* NAME##_layout() { return layout_of(static_cast<const TAKES*>(nullptr)); }
#define KERNEL(NAME, TAKES, ...)                                \
    extern "C" void NAME(const TAKES* p) { (__VA_ARGS__)(*p); } \
    TELLS(NAME, TAKES)
