import Host

/// The vCPU threads of a guest that has just arrived: they get their processors before others of ordinary priority, where the host allows
/// it. A vCPU that went through the gate in time and then waited for a processor would stand still for longer than anybody promised.
struct VirtualCPUHaste: Sendable {
    private let threads: [(thread: HostThread, before: Int32)]

    init(_ threads: [HostThread]) {
        self.threads = threads.compactMap { thread in thread.hasten().map { (thread, $0) } }
    }

    func end() { for (thread, before) in threads { thread.calm(to: before) } }
}
