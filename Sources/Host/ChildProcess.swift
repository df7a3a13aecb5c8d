import CLinux
import Glibc
import Synchronization

/// A process we started. It is waited for exactly once, and signalled only by its id while it is still ours.
public final class ChildProcess: Sendable {
    public let identifier: Int32
    public let name: String
    private let status = Mutex<ExitStatus?>(nil)

    public enum ExitStatus: Sendable, Equatable {
        case exited(CInt)
        case signalled(CInt)
        public var isSuccess: Bool { self == .exited(0) }
    }

    /// Starts a program with the given standard descriptors (`nil`: inherited).
    public init(
        _ arguments: [String], input: Descriptor? = nil, output: Descriptor? = nil, error: Descriptor? = nil
    ) throws(SystemError) {
        precondition(!arguments.isEmpty, "a program to start")
        name = arguments[0]
        var actions = unsafe posix_spawn_file_actions_t()
        unsafe posix_spawn_file_actions_init(&actions)
        defer { unsafe posix_spawn_file_actions_destroy(&actions) }
        for (descriptor, target) in [(input, 0), (output, 1), (error, 2)] {
            if let descriptor { unsafe posix_spawn_file_actions_adddup2(&actions, descriptor.number, CInt(target)) }
        }
        // The child starts with the default handling of all signals: what we ignore or block is not inherited.
        var attributes = posix_spawnattr_t()
        unsafe posix_spawnattr_init(&attributes)
        defer { unsafe posix_spawnattr_destroy(&attributes) }
        var signals = sigset_t()
        unsafe sigemptyset(&signals)
        unsafe posix_spawnattr_setsigmask(&attributes, &signals)
        unsafe sigfillset(&signals)
        unsafe posix_spawnattr_setsigdefault(&attributes, &signals)
        unsafe posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF))
        // SAFETY: the strings are copies which live until after the call; the array ends with nil, as execve wants.
        var words: [UnsafeMutablePointer<CChar>?] = unsafe arguments.map { unsafe strdup($0) } + [nil]
        defer { unsafe words.forEach { unsafe free($0) } }
        var child: pid_t = 0
        let failure = unsafe posix_spawnp(&child, arguments[0], &actions, &attributes, &words, environ)
        guard failure == 0 else { throw SystemError("start", arguments[0], code: failure) }
        identifier = child
    }

    /// The exit status once the process has ended; `nil` while it runs.
    public func poll() -> ExitStatus? {
        status.withLock { known in
            if let known { return known }
            var raw: CInt = 0
            guard unsafe waitpid(identifier, &raw, WNOHANG) == identifier else { return nil }
            let signal = raw & 0x7f
            known = signal == 0 ? .exited((raw >> 8) & 0xff) : .signalled(signal)
            return known
        }
    }

    /// Waits for the end. - Returns: `nil` when the deadline passes.
    public func wait(deadline: Deadline = .never) -> ExitStatus? {
        var pause: UInt64 = 200_000
        while true {
            if let status = poll() { return status }
            if deadline.hasPassed { return nil }
            Clock.sleep(nanoseconds: pause)
            pause = min(pause * 2, 10_000_000)
        }
    }

    /// Sends a signal, if the process has not been waited for.
    public func signal(_ number: CInt) {
        status.withLock { if $0 == nil { kill(identifier, number) } }
    }

    /// Ends the process: SIGTERM, then SIGKILL after `graceMilliseconds`.
    @discardableResult
    public func end(graceMilliseconds: UInt64 = 2000) -> ExitStatus? {
        signal(SIGTERM)
        if let status = wait(deadline: .after(milliseconds: graceMilliseconds)) { return status }
        signal(SIGKILL)
        return wait(deadline: .after(seconds: 10))
    }

    /// Asks the kernel to end this process when its parent dies. For children that must not outlive a test or demo.
    public static func dieWithParent() throws(SystemError) {
        try checked(gw_die_with_parent(SIGKILL), "prctl", "PR_SET_PDEATHSIG")
    }
}
