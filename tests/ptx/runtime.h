// What runtime.cpp has for cublas.cpp.
#pragma once
#include <functional>

namespace ptx {

// Has the device do something: at once, or when the graph that is recorded is launched.
void give(std::function<void()> step);

}  // namespace ptx
