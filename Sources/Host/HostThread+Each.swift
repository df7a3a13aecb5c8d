import Synchronization

extension HostThread {
    /// Calls `body` once for each number below `count`, in no order, on as many threads as there are processors, this one among them.
    /// Returns when all calls have.
    ///
    /// - Parameters:
    ///   - least: so many calls are worth a thread.
    ///   - isUrgent: the other threads run before those of ordinary priority (`runBeforeOthers`).
    public static func forEach(
        in count: Int, atLeast least: Int, isUrgent: Bool = false, _ body: @escaping @Sendable (Int) -> Void
    ) {
        let next = SharedCounter()
        let work: @Sendable () -> Void = {
            while let index = next.take(below: count) { body(index) }
        }
        let threads = min(HostMemory.processorCount, count / max(1, least))
        // One that cannot be started is no loss: this thread works as well.
        let others = (1..<max(1, threads)).compactMap { number in
            try? HostThread(name: "each\(number)") {
                if isUrgent { _ = runBeforeOthers() }
                work()
            }
        }
        work()
        for thread in others { thread.join() }
    }

    private final class SharedCounter: Sendable {
        private let next = Atomic(0)

        func take(below end: Int) -> Int? {
            let index = next.wrappingAdd(1, ordering: .relaxed).oldValue
            return index < end ? index : nil
        }
    }
}
