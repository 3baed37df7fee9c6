// What the Python side may call: a plain C interface, bound in native.py.
#pragma once

#define EXPORT extern "C" __attribute__((visibility("default")))
