#ifndef GODWIT_HOST_H
#define GODWIT_HOST_H
/* Swift imports this without _GNU_SOURCE: what glibc hides then is called by number. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/eventfd.h>
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
enum { GW_MADV_COLLAPSE = 25 }; /* Linux 6.1 */

/* The credentials of a unix socket's peer (SO_PEERCRED), or -errno. */
static inline int gw_peer_uid(int fd) {
    struct { int pid; unsigned uid, gid; } peer;
    socklen_t size = sizeof peer;
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 ? -errno : (int)peer.uid;
}
/* recvmsg(2) with room for one descriptor (SCM_RIGHTS): the bytes read, and *passed is the descriptor or -1. */
static inline long gw_receive_with_descriptor(int fd, void *_Nonnull buffer, size_t size, int *_Nonnull passed) {
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec piece = {buffer, size};
    struct msghdr message = {0};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = &control;
    message.msg_controllen = sizeof control;
    *passed = -1;
    long r = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    if (r < 0) return -errno;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) __builtin_memcpy(passed, CMSG_DATA(c), sizeof(int));
    return r;
}
/* sendmsg(2) which passes one descriptor along. */
static inline long gw_send_with_descriptor(int fd, const void *_Nonnull buffer, size_t size, int passed) {
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec piece = {(void *)buffer, size};
    struct msghdr message = {0};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = &control;
    message.msg_controllen = sizeof control.space;
    struct cmsghdr *c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    __builtin_memcpy(CMSG_DATA(c), &passed, sizeof(int));
    long r = sendmsg(fd, &message, MSG_NOSIGNAL);
    return r < 0 ? -errno : r;
}

/* PAGEMAP_SCAN (Linux 6.7; Documentation/admin-guide/mm/pagemap.rst), which older headers lack. */
struct gw_page_region {
    uint64_t start, end, categories;
};
struct gw_pm_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
enum { GW_PAGE_IS_PRESENT = 8, GW_PAGE_IS_SWAPPED = 16, GW_PAGE_IS_PFNZERO = 32, GW_PAGE_IS_HUGE = 64 };
static inline int gw_pagemap_scan(int fd, struct gw_pm_scan_arg *_Nonnull argument) {
    int r = ioctl(fd, _IOWR('f', 16, struct gw_pm_scan_arg), argument);
    return r < 0 ? -errno : r;
}

/* Has the processor fetch what stands there, if it is memory; never fails. */
static inline void gw_fetch(const void *_Nonnull address) { __builtin_prefetch(address); }

enum { GW_SEEK_DATA = 3, GW_SEEK_HOLE = 4 };

/* prctl(2), pthread_setname_np(3) and fcntl(2) are variadic or hidden from Swift. They return -errno. */
static inline int gw_thread_set_name(const char *_Nonnull name) {
    return prctl(PR_SET_NAME, name, 0, 0, 0) < 0 ? -errno : 0;
}
static inline int gw_set_timer_slack(unsigned long nanoseconds) {
    return prctl(PR_SET_TIMERSLACK, nanoseconds, 0, 0, 0) < 0 ? -errno : 0;
}
/* sched_setattr(2): an ordinary thread's turn on a processor, in nanoseconds; 0: the kernel's choice. Linux before 6.12 takes it for nothing. */
static inline int gw_set_turn(int thread, int nice, unsigned long long nanoseconds) {
    struct {
        unsigned int size, policy;
        unsigned long long flags;
        int nice;
        unsigned int priority;
        unsigned long long runtime, deadline, period;
    } attributes = {.size = sizeof attributes, .nice = nice, .runtime = nanoseconds};
    return syscall(SYS_sched_setattr, thread, &attributes, 0u) < 0 ? -errno : 0;
}
static inline int gw_die_with_parent(int signal_number) {
    return prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) < 0 ? -errno : 0;
}
static inline int gw_fcntl_int(int fd, int command, int argument) {
    int r = fcntl(fd, command, argument);
    return r < 0 ? -errno : r;
}
static inline int gw_pipe2(int *_Nonnull ends, int flags) { return syscall(SYS_pipe2, ends, flags) < 0 ? -errno : 0; }
static inline int gw_eventfd(void) {
    int r = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return r < 0 ? -errno : r;
}
static inline int gw_memfd_create(const char *_Nonnull name) {
    int r = (int)syscall(SYS_memfd_create, name, 3u /* MFD_CLOEXEC | MFD_ALLOW_SEALING */);
    return r < 0 ? -errno : r;
}
/* Of huge pages of 2^shift bytes. */
static inline int gw_memfd_create_huge(const char *_Nonnull name, unsigned shift) {
    int r = (int)syscall(SYS_memfd_create, name, 7u /* with MFD_HUGETLB */ | shift << 26 /* MFD_HUGE_SHIFT */);
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
