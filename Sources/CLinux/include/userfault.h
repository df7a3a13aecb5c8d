#ifndef GODWIT_USERFAULT_H
#define GODWIT_USERFAULT_H
#include "kvm.h"
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Page faults handled by this process: userfaultfd(2), ioctl_userfaultfd(2). All return -errno. */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

enum { GW_UFFD_FLAGS = O_CLOEXEC | O_NONBLOCK };
static inline int gw_userfaultfd(void) {
    int r = (int)syscall(SYS_userfaultfd, GW_UFFD_FLAGS);
    return r < 0 ? -errno : r;
}
/* The same by /dev/userfaultfd (Linux 6.1), whose permissions say who may. */
GW_IOCTL_INT(gw_userfaultfd_new, USERFAULTFD_IOC_NEW)

GW_IOCTL_PTR(gw_uffd_api, UFFDIO_API, struct uffdio_api)
GW_IOCTL_PTR(gw_uffd_register, UFFDIO_REGISTER, struct uffdio_register)
GW_IOCTL_PTR(gw_uffd_unregister, UFFDIO_UNREGISTER, struct uffdio_range)
GW_IOCTL_PTR(gw_uffd_wake, UFFDIO_WAKE, struct uffdio_range)
GW_IOCTL_PTR(gw_uffd_copy, UFFDIO_COPY, struct uffdio_copy)
GW_IOCTL_PTR(gw_uffd_zeropage, UFFDIO_ZEROPAGE, struct uffdio_zeropage)
GW_IOCTL_PTR(gw_uffd_write_protect, UFFDIO_WRITEPROTECT, struct uffdio_writeprotect)
GW_IOCTL_PTR(gw_uffd_continue, UFFDIO_CONTINUE, struct uffdio_continue)

/* Linux 6.8: pages change their place instead of being copied. */
struct gw_uffd_move_request { __u64 dst, src, len, mode; __s64 moved; };
enum { GW_UFFD_FEATURE_MOVE = 1 << 16 };
GW_IOCTL_PTR(gw_uffd_move, _IOWR(0xAA, 0x05, struct gw_uffd_move_request), struct gw_uffd_move_request)

/* Where the fields of a message stand: it is packed and full of unions, which Swift takes apart by hand. */
enum {
    GW_UFFD_MESSAGE_BYTES = sizeof(struct uffd_msg),
    GW_UFFD_MESSAGE_FLAGS = offsetof(struct uffd_msg, arg.pagefault.flags),
    GW_UFFD_MESSAGE_ADDRESS = offsetof(struct uffd_msg, arg.pagefault.address),
    GW_UFFD_MESSAGE_THREAD = offsetof(struct uffd_msg, arg.pagefault.feat.ptid),
};
#endif
