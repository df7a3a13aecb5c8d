#ifndef GODWIT_CLINUX_H
#define GODWIT_CLINUX_H
/* Headers that Swift cannot import by itself: the ioctl macros and variadic calls of Linux. No code with a state. */
#include "kvm.h"
#include "host.h"
#endif
