import Glibc
public import Host
import Synchronization

/// Turns the signals that ask a process to end into calls on a thread, where anything may be done.
public enum SignalWatch {
    public static let names: [CInt: String] = [SIGINT: "SIGINT", SIGTERM: "SIGTERM", SIGHUP: "SIGHUP"]

    /// Blocks SIGINT, SIGTERM and SIGHUP in this thread and those it starts from now on, and calls `handler` for each that
    /// comes. Call it first thing on the main thread. A SIGHUP that the parent told us to ignore (`nohup`) stays ignored.
    ///
    /// - Throws: `SystemError` if the thread cannot be started.
    public static func start(_ handler: @escaping @Sendable (_ signal: CInt) -> Void) throws(SystemError) {
        let watched = names.keys.filter { !isIgnored($0) }
        var set = sigset_t()
        unsafe sigemptyset(&set)
        for number in watched { unsafe sigaddset(&set, number) }
        let status = unsafe pthread_sigmask(SIG_BLOCK, &set, nil)
        guard status == 0 else { throw SystemError("block signals", code: status) }
        _ = try HostThread(name: "signals") { wait(for: watched, handler) }
    }

    /// Notes that a signal came.
    /// - Parameter again: called for each signal after the first, from people who do not want to wait.
    /// - Throws: as `start`.
    public static func startFlag(
        again: @escaping @Sendable (_ signal: CInt) -> Void = { _ in }
    ) throws(SystemError) -> Flag {
        let flag = Flag()
        try start { signal in
            if flag.isRaised { again(signal) } else { flag.raise() }
        }
        return flag
    }

    /// Raised for good by the first signal.
    public final class Flag: Sendable {
        private let value = Atomic(false)
        public var isRaised: Bool { value.load(ordering: .relaxed) }
        func raise() { value.store(true, ordering: .relaxed) }
    }

    private static func wait(for watched: [CInt], _ handler: @Sendable (CInt) -> Void) {
        var set = sigset_t()
        unsafe sigemptyset(&set)
        for number in watched { unsafe sigaddset(&set, number) }
        while true {
            var number: CInt = 0
            if unsafe sigwait(&set, &number) == 0 { handler(number) }
        }
    }

    private static func isIgnored(_ number: CInt) -> Bool {
        var action = sigaction()
        // SAFETY: the call only fills `action`; the handler is compared with SIG_IGN (1), never called.
        guard unsafe sigaction(number, nil, &action) == 0 else { return false }
        return unsafe unsafeBitCast(action.__sigaction_handler.sa_handler, to: Int.self) == 1
    }
}
