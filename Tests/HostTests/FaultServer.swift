import Host
import Synchronization

/// A thread that ends the faults of a userfaultfd as it is told to, and writes them down.
final class FaultServer: Sendable {
    let faults: UserFault
    private let stop: EventDescriptor
    private let thread: HostThread
    private let record: Record

    private final class Record: Sendable {
        let seen = Mutex<[PageFault]>([])
        let errors = Mutex<[String]>([])
    }

    /// - Parameter resolve: ends a fault.
    init(_ faults: UserFault, _ resolve: @escaping @Sendable (UserFault, PageFault) throws -> Void) throws {
        let stop = try EventDescriptor()
        let record = Record()
        self.faults = faults
        self.stop = stop
        self.record = record
        thread = try HostThread(name: "fault") {
            var batch = PageFaultBatch(capacity: 16)
            do {
                while try faults.waitForFaults(into: &batch, stop: stop) {
                    for index in 0..<batch.count {
                        record.seen.withLock { $0.append(batch[index]) }
                        try resolve(faults, batch[index])
                    }
                }
            } catch { record.errors.withLock { $0.append("\(error)") } }
        }
    }

    var seen: [PageFault] { record.seen.withLock { $0 } }
    var errors: [String] { record.errors.withLock { $0 } }

    func end() {
        stop.raise()
        thread.join()
    }
}

/// Something another thread does, which may sleep in a fault for good: whoever waits for it gives up.
final class Touch: Sendable {
    private let done: EventDescriptor
    let thread: HostThread

    init(_ body: @escaping @Sendable () -> Void) throws {
        let done = try EventDescriptor()
        self.done = done
        thread = try HostThread(name: "touch") {
            body()
            done.raise()
        }
    }

    func hasEnded(within milliseconds: UInt64 = 20_000) -> Bool {
        let deadline = Deadline.after(milliseconds: milliseconds)
        let ready = try? poll([(done.descriptor, .readable)], deadline: deadline)
        return ready?[0].contains(.readable) ?? false
    }
}
