import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host
import Synchronization

// The exit loop's inner half: enter the guest, answer one access, say what happened. The outer half is Machine's vCPU thread.

extension KVMVirtualCPU {
    func run(_ bus: any Bus) -> ExitReason {
        if sleepWhilePaused() || sleepWhileThrottled() { return .interrupted }
        runner.withLock { $0 = pthread_self() }
        let generation = slots.generation.load(ordering: .acquiring)
        exitReason = 0
        let result: CInt
        do throws(SystemError) { result = try enterGuest() } catch {
            return .failed("vcpu\(index): its dirty ring cannot be given back to the kernel: \(error.description)")
        }
        hasPendingAccess = false
        guard result >= 0 else {
            if result == -ENOTRECOVERABLE, let damage = slots.damage {
                return .failed("vcpu\(index): the memory layout could not be changed, nor left as it was: \(damage)")
            }
            if result == -EINTR || result == -EAGAIN { return .interrupted }
            if result == -EFAULT { return resolveFault(since: generation) }
            return .failed(SystemError("KVM_RUN", "vcpu\(index)", code: -result).description)
        }
        // SAFETY: the kernel filled the shared area; it does not touch it again before the next KVM_RUN of this thread.
        let reason = unsafe shared.withMutableBytes(at: 0, count: shared.byteCount) { area in
            unsafe answer(area, area.baseAddress!.assumingMemoryBound(to: kvm_run.self), bus)
        }
        if case .failed = reason, exitReason == UInt32(KVM_EXIT_INTERNAL_ERROR),
            case .retry = slots.resolveEmulationFailure(since: generation)
        {
            return .handled
        }
        return reason
    }

    /// KVM_RUN, unless vCPUs are held: then after that. - Throws: where pages cannot be watched that must be first.
    private func enterGuest() throws(SystemError) -> CInt {
        slots.hold.enter(self)
        defer { slots.hold.leave(self) }
        guard slots.damage == nil else { return -ENOTRECOVERABLE }
        let began = beginRun()
        defer { endRun(began) }
        guard let ring else { return gw_kvm_run(descriptor.number, 0) }
        // Watched pages must be watched before the guest can write: see `DirtyRings.giveBack`.
        ring.isInGuest.store(true, ordering: .sequentiallyConsistent)
        defer { ring.isInGuest.store(false, ordering: .releasing) }
        if ring.sum.isResetDue.load(ordering: .sequentiallyConsistent) {
            try whenResetIsDue?()
        }
        return gw_kvm_run(descriptor.number, 0)
    }

    private var exitReason: UInt32 {
        get { shared.load(at: MemoryLayout<kvm_run>.offset(of: \.exit_reason)!, as: UInt32.self) }
        set { shared.store(newValue, at: MemoryLayout<kvm_run>.offset(of: \.exit_reason)!) }
    }

    /// The instruction that failed has not been carried out: it is tried again once the slots agree with the memory layout.
    private func resolveFault(since generation: UInt64) -> ExitReason {
        // Kernels that do not tell the address leave the reason alone.
        var address: GuestPhysicalAddress?
        if exitReason == UInt32(GW_KVM_EXIT_MEMORY_FAULT) {
            let fault = MemoryLayout<kvm_run>.offset(of: \.apic_base)! + 8
            address = GuestPhysicalAddress(shared.load(at: fault + 8, as: UInt64.self))
        }
        switch slots.resolveFault(at: address, since: generation) {
        case .retry: return .handled
        case .fail(let sentence): return .failed("vcpu\(index): \(sentence)")
        }
    }

    private func answer(
        _ area: UnsafeMutableRawBufferPointer, _ run: UnsafeMutablePointer<kvm_run>, _ bus: any Bus
    ) -> ExitReason {
        switch CInt(bitPattern: unsafe run.pointee.exit_reason) {
        case KVM_EXIT_IO:
            hasPendingAccess = true
            unsafe answerPort(area, run, bus)
            return .handled
        case KVM_EXIT_MMIO:
            hasPendingAccess = true
            unsafe answerMemory(run, bus)
            return .handled
        case KVM_EXIT_DIRTY_RING_FULL: return emptyRing()
        case KVM_EXIT_HLT: return .halted
        case KVM_EXIT_SHUTDOWN: return .reset
        case KVM_EXIT_INTR, KVM_EXIT_IRQ_WINDOW_OPEN: return .interrupted
        case KVM_EXIT_SYSTEM_EVENT: return .reset
        case KVM_EXIT_FAIL_ENTRY:
            let reason = unsafe run.pointee.fail_entry.hardware_entry_failure_reason
            return .failed(
                "vcpu\(index): the processor refused to enter the guest, reason 0x\(String(reason, radix: 16))")
        case KVM_EXIT_INTERNAL_ERROR:
            let code = unsafe run.pointee.internal.suberror
            let place = (try? registers()).map { " at rip 0x" + String($0.rip, radix: 16) } ?? ""
            return .failed("vcpu\(index): KVM cannot run the guest on\(place), internal error \(code)")
        case let other:
            return .failed("vcpu\(index): KVM left the guest for reason \(other), which this machine does not serve")
        }
    }

    /// The kernel may say so early, and somebody else may have emptied it since: the guest runs on either way.
    private func emptyRing() -> ExitReason {
        do throws(SystemError) {
            try whenRingIsFull?()
            return .handled
        } catch { return .failed("vcpu\(index): \(error.description)") }
    }

    /// String instructions arrive as `count` accesses of one port at once.
    private func answerPort(_ area: UnsafeMutableRawBufferPointer, _ run: UnsafeMutablePointer<kvm_run>, _ bus: any Bus)
    {
        let io = unsafe run.pointee.io
        let size = Int(io.size)
        for number in 0..<Int(io.count) {
            let offset = Int(io.data_offset) + number * size
            if CInt(io.direction) == KVM_EXIT_IO_OUT {
                var value: UInt32 = 0
                for byte in 0..<size { unsafe value |= UInt32(area[offset + byte]) << UInt32(byte * 8) }
                bus.portWrite(io.port, size: size, value: value, from: self)
            } else {
                let value = bus.portRead(io.port, size: size, from: self)
                for byte in 0..<size {
                    unsafe area[offset + byte] = UInt8(truncatingIfNeeded: value >> UInt32(byte * 8))
                }
            }
        }
    }

    private func answerMemory(_ run: UnsafeMutablePointer<kvm_run>, _ bus: any Bus) {
        let access = unsafe run.pointee.mmio
        let address = GuestPhysicalAddress(access.phys_addr)
        let size = min(8, Int(access.len))
        if access.is_write != 0 {
            var data = access.data
            var value: UInt64 = 0
            unsafe withUnsafeBytes(of: &data) { bytes in
                for byte in 0..<size { unsafe value |= UInt64(bytes[byte]) << UInt64(byte * 8) }
            }
            bus.memoryWrite(address, size: size, value: value)
        } else {
            var value = bus.memoryRead(address, size: size).littleEndian
            unsafe withUnsafeBytes(of: &value) { source in
                unsafe withUnsafeMutableBytes(of: &run.pointee.mmio.data) { unsafe $0.copyMemory(from: source) }
            }
        }
    }

    func completePendingAccess(_ bus: any Bus) {
        while hasPendingAccess {
            setImmediateExit(true)
            exitReason = 0
            // What the guest is given may be written into its memory.
            // What is due and fails here fails again, with its sentence, when the vCPU is to run on.
            let result = try? enterGuest()
            hasPendingAccess = false
            guard let result, result >= 0, !isCompleting,
                exitReason == UInt32(KVM_EXIT_IO) || exitReason == UInt32(KVM_EXIT_MMIO)
            else { return }
            // An access to two pages, or of more than 8 bytes, goes on in parts before its instruction is done.
            isCompleting = true
            defer { isCompleting = false }
            // SAFETY: as in `run`.
            _ = unsafe shared.withMutableBytes(at: 0, count: shared.byteCount) { area in
                unsafe answer(area, area.baseAddress!.assumingMemoryBound(to: kvm_run.self), bus)
            }
        }
    }
}
