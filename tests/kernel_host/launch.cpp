// One kernel as a host library: ``hexgen_emulated`` points to a function (grid x, grid y, threads, bytes of shared
// memory, the kernel's own parameters ...).
#include HX_SOURCE

template <auto>
struct Emulated;
template <class... P, void (*kernel)(P...)>
struct Emulated<kernel> {
    static void call(int x, int y, int threads, int bytes, P... parameters) {
        emulation::launch(x, y, threads, bytes, [=] { kernel(parameters...); });
    }
};
extern "C" {
void* hexgen_emulated = (void*)&Emulated<HX_KERNEL>::call;
}
