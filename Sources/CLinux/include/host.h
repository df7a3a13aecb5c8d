#ifndef GODWIT_HOST_H
#define GODWIT_HOST_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum { GW_SEEK_DATA = 3, GW_SEEK_HOLE = 4 };

/* prctl(2), pthread_setname_np(3) and fcntl(2) are variadic or hidden from Swift. They return -errno. */
static inline int gw_thread_set_name(const char *_Nonnull name) {
    return prctl(PR_SET_NAME, name, 0, 0, 0) < 0 ? -errno : 0;
}
static inline int gw_die_with_parent(int signal_number) {
    return prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) < 0 ? -errno : 0;
}
static inline int gw_fcntl_int(int fd, int command, int argument) {
    int r = fcntl(fd, command, argument);
    return r < 0 ? -errno : r;
}
static inline int gw_gettid(void) { return (int)syscall(SYS_gettid); }

/* A signal whose only effect is that a blocked system call returns EINTR: no SA_RESTART, nothing in the handler. */
static inline void gw_interrupt_handler(int signal_number) { (void)signal_number; }
static inline int gw_interrupt_install(int signal_number) {
    struct sigaction action = {0};
    action.sa_handler = gw_interrupt_handler;
    return sigaction(signal_number, &action, NULL) < 0 ? -errno : 0;
}
#endif
