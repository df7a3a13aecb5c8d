import Host
import Synchronization

/// Keeps vCPUs out of the guest for a moment, whatever the machine's run state is and whoever asks: a vCPU's thread may as well, once it
/// has come out of KVM_RUN itself.
///
/// Unlike the machine's gate it waits for nothing but KVM_RUN: a vCPU that is just being answered, by a device or by a look at guest
/// memory that waits for a commit, is outside already, and stays outside.
final class VirtualCPUHold: Sendable {
    /// Looked at by every vCPU before it enters the guest.
    private let isHeld = Atomic<Bool>(false)
    /// Its lock makes sure that nobody misses a change of what it waits for.
    private let changed = Monitor(false)
    private let cpus = Mutex<[Member]>([])

    /// vCPUs keep the slots, and with them this.
    private struct Member {
        weak var cpu: KVMVirtualCPU?
    }

    func add(_ cpu: KVMVirtualCPU) { cpus.withLock { $0.append(Member(cpu: cpu)) } }

    /// Call on the vCPU's thread before KVM_RUN. Waits while vCPUs are held.
    func enter(_ cpu: KVMVirtualCPU) {
        while true {
            // First in, then the look; `hold` first closes, then looks who is in. One of both sees the other.
            cpu.isInside.store(true, ordering: .sequentiallyConsistent)
            guard isHeld.load(ordering: .sequentiallyConsistent) else { return }
            leave(cpu)
            changed.wait { _ in isHeld.load(ordering: .sequentiallyConsistent) ? nil : () }
        }
    }

    /// Call after KVM_RUN.
    func leave(_ cpu: KVMVirtualCPU) {
        cpu.isInside.store(false, ordering: .sequentiallyConsistent)
        if isHeld.load(ordering: .sequentiallyConsistent) { changed.withLock { _ in } }
    }

    /// Runs `body` while no vCPU is inside KVM_RUN. One caller at a time.
    func hold<R, E: Error>(_ body: () throws(E) -> R) throws(E) -> R {
        isHeld.store(true, ordering: .sequentiallyConsistent)
        defer {
            isHeld.store(false, ordering: .sequentiallyConsistent)
            changed.withLock { _ in }
        }
        let all = cpus.withLock { $0.compactMap(\.cpu) }
        for cpu in all where cpu.isInside.load(ordering: .sequentiallyConsistent) { cpu.kick() }
        changed.wait { _ in all.contains { $0.isInside.load(ordering: .sequentiallyConsistent) } ? nil : () }
        return try body()
    }
}
