// The interface for Python: plain C functions, bound in native.py.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))
