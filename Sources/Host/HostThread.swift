import CLinux
import Glibc
import Synchronization

/// An operating-system thread with a name. It may block in system calls: nothing of ours runs on Swift's cooperative pool.
public final class HostThread: Sendable {
    public let name: String
    private let handle: pthread_t
    private let kernelID: Atomic<Int32>
    private let joined = Mutex(false)

    /// The signal that makes a thread leave a blocking system call (`interrupt`).
    public static let interruptSignal: CInt = SIGUSR1

    private final class Entry: Sendable {
        let name: String
        let body: @Sendable () -> Void
        let started: @Sendable (Int32) -> Void
        init(name: String, body: @escaping @Sendable () -> Void, started: @escaping @Sendable (Int32) -> Void) {
            self.name = name
            self.body = body
            self.started = started
        }
    }

    private final class Start: Sendable {
        let id = Mutex<Int32?>(nil)
        let ready: EventDescriptor
        init() throws(SystemError) { ready = try EventDescriptor() }
    }

    /// Starts a thread which runs `body` and ends. The kernel shows the first 15 bytes of the name.
    public init(name: String, stackBytes: Int = 1 << 20, _ body: @escaping @Sendable () -> Void) throws(SystemError) {
        self.name = name
        let start = try Start()
        let entry = Entry(name: String(name.prefix(15)), body: body) { id in
            start.id.withLock { $0 = id }
            start.ready.raise()
        }
        var attributes = pthread_attr_t()
        unsafe pthread_attr_init(&attributes)
        defer { unsafe pthread_attr_destroy(&attributes) }
        unsafe pthread_attr_setstacksize(&attributes, stackBytes)
        var created = pthread_t()
        // SAFETY: the entry is retained here and released by the thread, which runs exactly once if pthread_create succeeds.
        let context = unsafe Unmanaged.passRetained(entry)
        let status = unsafe pthread_create(
            &created, &attributes, { unsafe HostThread.runEntry($0) }, context.toOpaque())
        guard status == 0 else {
            unsafe context.release()
            throw SystemError("start thread", name, code: status)
        }
        handle = created
        try start.ready.descriptor.wait(for: .readable, deadline: .never, operation: "start thread")
        kernelID = Atomic(start.id.withLock { $0 } ?? 0)
    }

    /// Names the calling thread anew; the kernel shows the first 15 bytes.
    public static func renameCurrent(_ name: String) { _ = unsafe gw_thread_set_name(String(name.prefix(15))) }

    private static func runEntry(_ context: UnsafeMutableRawPointer?) -> UnsafeMutableRawPointer? {
        // SAFETY: `context` is the retained entry of `init`; this takes over that reference.
        let entry = unsafe Unmanaged<Entry>.fromOpaque(context!).takeRetainedValue()
        _ = unsafe gw_thread_set_name(entry.name)
        unblockInterruptSignal()
        entry.started(gw_gettid())
        entry.body()
        return nil
    }

    /// A thread inherits what its creator blocks (libdispatch's workers block nearly all), and a process what its parent does:
    /// either would make `interrupt` go unheard.
    private static func unblockInterruptSignal() {
        var signals = sigset_t()
        unsafe sigemptyset(&signals)
        unsafe sigaddset(&signals, interruptSignal)
        unsafe pthread_sigmask(SIG_UNBLOCK, &signals, nil)
    }

    /// A thread nobody can join any more cleans up after itself; its stack would stay otherwise.
    deinit {
        joined.withLock { done in
            if !done { pthread_detach(handle) }
            done = true
        }
    }

    /// The kernel's thread id, as in /proc/PID/task.
    public var identifier: Int32 { kernelID.load(ordering: .relaxed) }

    /// Waits for the end of the thread. A second call returns at once.
    public func join() {
        joined.withLock { done in
            guard !done else { return }
            done = true
            pthread_join(handle, nil)
        }
    }

    /// Makes a blocking system call of the thread return EINTR. Call `installInterruptSignal` once before.
    /// Harmless on a thread which has ended but was not joined.
    public func interrupt() {
        joined.withLock { if !$0 { pthread_kill(handle, Self.interruptSignal) } }
    }

    /// Installs the empty handler of `interruptSignal`, and ignores SIGPIPE: a closed peer is an error value here.
    public static func installInterruptSignal() throws(SystemError) {
        try checked(gw_interrupt_install(interruptSignal), "sigaction", "SIGUSR1")
        signal(SIGPIPE, SIG_IGN)
    }
}
