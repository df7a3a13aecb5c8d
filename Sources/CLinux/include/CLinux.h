#ifndef GODWIT_CLINUX_H
#define GODWIT_CLINUX_H
/*
 * Headers that Swift cannot import by itself: the ioctl macros and variadic calls of Linux, and a loop compiled for processors that have
 * more than every x86-64 has. No code with a state.
 */
#include "kvm.h"
#include "host.h"
#include "pagehash.h"
#include "userfault.h"
#endif
