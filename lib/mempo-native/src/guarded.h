// Exceptions as messages: every function that Rust calls gives null, or a message that stays readable until the thread's
// next call.

#pragma once

#include <exception>
#include <string>

inline thread_local std::string message;

template <typename F> const char *guarded(F run) {
  try {
    run();
    return nullptr;
  } catch (const std::exception &error) {
    message = error.what();
    return message.c_str();
  } catch (...) {
    message = "an unknown C++ exception";
    return message.c_str();
  }
}
