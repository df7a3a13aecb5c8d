#ifndef GODWIT_KVM_H
#define GODWIT_KVM_H
#include <errno.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>

/* One line per ioctl: the size is checked by the C compiler, the result is -errno on failure. */
#define GW_IOCTL_PTR(name, request, type)                                                     \
    _Static_assert(_IOC_SIZE(request) == sizeof(type), #request " takes another type");      \
    static inline int name(int fd, type *_Nonnull argument) {                                 \
        int r = ioctl(fd, request, argument);                                                 \
        return r < 0 ? -errno : r;                                                            \
    }
#define GW_IOCTL_INT(name, request)                                                           \
    static inline int name(int fd, unsigned long argument) {                                  \
        int r = ioctl(fd, request, argument);                                                 \
        return r < 0 ? -errno : r;                                                            \
    }

GW_IOCTL_INT(gw_kvm_get_api_version, KVM_GET_API_VERSION)
GW_IOCTL_INT(gw_kvm_create_vm, KVM_CREATE_VM)
GW_IOCTL_INT(gw_kvm_check_extension, KVM_CHECK_EXTENSION)
GW_IOCTL_INT(gw_kvm_get_vcpu_mmap_size, KVM_GET_VCPU_MMAP_SIZE)

GW_IOCTL_PTR(gw_kvm_enable_cap, KVM_ENABLE_CAP, struct kvm_enable_cap)
GW_IOCTL_INT(gw_kvm_create_vcpu, KVM_CREATE_VCPU)
GW_IOCTL_PTR(gw_kvm_set_user_memory_region, KVM_SET_USER_MEMORY_REGION, struct kvm_userspace_memory_region)
GW_IOCTL_PTR(gw_kvm_get_dirty_log, KVM_GET_DIRTY_LOG, struct kvm_dirty_log)
GW_IOCTL_PTR(gw_kvm_clear_dirty_log, KVM_CLEAR_DIRTY_LOG, struct kvm_clear_dirty_log)
GW_IOCTL_INT(gw_kvm_set_tss_addr, KVM_SET_TSS_ADDR)
GW_IOCTL_PTR(gw_kvm_set_identity_map_addr, KVM_SET_IDENTITY_MAP_ADDR, __u64)
GW_IOCTL_INT(gw_kvm_create_irqchip, KVM_CREATE_IRQCHIP)
GW_IOCTL_PTR(gw_kvm_irq_line, KVM_IRQ_LINE, struct kvm_irq_level)
GW_IOCTL_PTR(gw_kvm_get_irqchip, KVM_GET_IRQCHIP, struct kvm_irqchip)
GW_IOCTL_PTR(gw_kvm_create_pit2, KVM_CREATE_PIT2, struct kvm_pit_config)
GW_IOCTL_PTR(gw_kvm_get_pit2, KVM_GET_PIT2, struct kvm_pit_state2)
GW_IOCTL_PTR(gw_kvm_set_pit2, KVM_SET_PIT2, struct kvm_pit_state2)
GW_IOCTL_PTR(gw_kvm_get_clock, KVM_GET_CLOCK, struct kvm_clock_data)
GW_IOCTL_PTR(gw_kvm_set_clock, KVM_SET_CLOCK, struct kvm_clock_data)

GW_IOCTL_INT(gw_kvm_reset_dirty_rings, KVM_RESET_DIRTY_RINGS)

/* An entry of a dirty ring is the kernel's until its flags say dirty, and the kernel's again once they say reset. */
enum { GW_DIRTY_GFN_DIRTY = 1, GW_DIRTY_GFN_RESET = 2 };
static inline unsigned gw_dirty_gfn_flags(const struct kvm_dirty_gfn *_Nonnull entry) {
    return __atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE);
}
static inline void gw_dirty_gfn_give_back(struct kvm_dirty_gfn *_Nonnull entry) {
    __atomic_store_n(&entry->flags, GW_DIRTY_GFN_RESET, __ATOMIC_RELEASE);
}

GW_IOCTL_INT(gw_kvm_run, KVM_RUN)
GW_IOCTL_PTR(gw_kvm_get_regs, KVM_GET_REGS, struct kvm_regs)
GW_IOCTL_PTR(gw_kvm_set_regs, KVM_SET_REGS, struct kvm_regs)
GW_IOCTL_PTR(gw_kvm_get_sregs, KVM_GET_SREGS, struct kvm_sregs)
GW_IOCTL_PTR(gw_kvm_set_sregs, KVM_SET_SREGS, struct kvm_sregs)
GW_IOCTL_PTR(gw_kvm_get_lapic, KVM_GET_LAPIC, struct kvm_lapic_state)
GW_IOCTL_PTR(gw_kvm_set_lapic, KVM_SET_LAPIC, struct kvm_lapic_state)
GW_IOCTL_PTR(gw_kvm_get_mp_state, KVM_GET_MP_STATE, struct kvm_mp_state)
GW_IOCTL_PTR(gw_kvm_set_mp_state, KVM_SET_MP_STATE, struct kvm_mp_state)
GW_IOCTL_PTR(gw_kvm_get_vcpu_events, KVM_GET_VCPU_EVENTS, struct kvm_vcpu_events)
GW_IOCTL_PTR(gw_kvm_set_vcpu_events, KVM_SET_VCPU_EVENTS, struct kvm_vcpu_events)
GW_IOCTL_PTR(gw_kvm_get_debugregs, KVM_GET_DEBUGREGS, struct kvm_debugregs)
GW_IOCTL_PTR(gw_kvm_set_debugregs, KVM_SET_DEBUGREGS, struct kvm_debugregs)
GW_IOCTL_PTR(gw_kvm_get_xcrs, KVM_GET_XCRS, struct kvm_xcrs)
GW_IOCTL_PTR(gw_kvm_set_xcrs, KVM_SET_XCRS, struct kvm_xcrs)
GW_IOCTL_PTR(gw_kvm_translate, KVM_TRANSLATE, struct kvm_translation)
GW_IOCTL_INT(gw_kvm_get_tsc_khz, KVM_GET_TSC_KHZ)
GW_IOCTL_INT(gw_kvm_set_tsc_khz, KVM_SET_TSC_KHZ)
GW_IOCTL_INT(gw_kvm_kvmclock_ctrl, KVM_KVMCLOCK_CTRL)

/* Linux 6.8: KVM_RUN failed with EFAULT; flags, guest address and size stand in the union of kvm_run. */
enum { GW_KVM_EXIT_MEMORY_FAULT = 39 };

GW_IOCTL_PTR(gw_kvm_set_irqchip, KVM_SET_IRQCHIP, struct kvm_irqchip)

/* Structures with a flexible tail, which Swift cannot express: the caller passes header and tail as one area. */
#define GW_IOCTL_RAW(name, request)                                                           \
    static inline int name(int fd, void *_Nonnull area) {                                     \
        int r = ioctl(fd, request, area);                                                     \
        return r < 0 ? -errno : r;                                                            \
    }
GW_IOCTL_RAW(gw_kvm_get_supported_cpuid_raw, KVM_GET_SUPPORTED_CPUID)
GW_IOCTL_RAW(gw_kvm_get_msr_index_list_raw, KVM_GET_MSR_INDEX_LIST)
GW_IOCTL_RAW(gw_kvm_get_msrs_raw, KVM_GET_MSRS)
GW_IOCTL_RAW(gw_kvm_set_msrs_raw, KVM_SET_MSRS)
GW_IOCTL_RAW(gw_kvm_set_cpuid2_raw, KVM_SET_CPUID2)
GW_IOCTL_RAW(gw_kvm_get_xsave2_raw, KVM_GET_XSAVE2)
GW_IOCTL_RAW(gw_kvm_set_xsave_raw, KVM_SET_XSAVE)
#endif
