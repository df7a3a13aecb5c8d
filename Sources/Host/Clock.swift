import Glibc

/// The clocks of the host, in nanoseconds.
public enum Clock {
    /// Time since an arbitrary start; never goes backwards.
    public static var monotonicNanoseconds: UInt64 { read(CLOCK_MONOTONIC) }

    /// Time since 1970 as the host believes it.
    public static var realtimeNanoseconds: UInt64 { read(CLOCK_REALTIME) }

    /// CPU time used by all threads of this process.
    public static var processCPUNanoseconds: UInt64 { read(CLOCK_PROCESS_CPUTIME_ID) }

    /// CPU time used by the calling thread.
    public static var threadCPUNanoseconds: UInt64 { read(CLOCK_THREAD_CPUTIME_ID) }

    private static func read(_ clock: clockid_t) -> UInt64 {
        var time = timespec()
        // SAFETY: clock_gettime fills the structure it is given and keeps no pointer.
        let status = unsafe clock_gettime(clock, &time)
        precondition(status == 0, "the kernel offers the clocks of POSIX")
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }

    /// Sleeps at least this long, also across signals.
    public static func sleep(nanoseconds: UInt64) {
        var wanted = timespec(tv_sec: Int(nanoseconds / 1_000_000_000), tv_nsec: Int(nanoseconds % 1_000_000_000))
        var left = timespec()
        // SAFETY: both structures are local; nanosleep keeps no pointer.
        while unsafe nanosleep(&wanted, &left) != 0, errno == EINTR {
            wanted = left
        }
    }
}

/// A moment on the monotonic clock by which something must have happened.
public struct Deadline: Sendable, Comparable {
    /// On `Clock.monotonicNanoseconds`; `UInt64.max` stands for never.
    public let nanoseconds: UInt64

    public static let never = Deadline(at: .max)

    public init(at nanoseconds: UInt64) { self.nanoseconds = nanoseconds }

    public static func after(nanoseconds: UInt64) -> Deadline {
        let (sum, overflow) = Clock.monotonicNanoseconds.addingReportingOverflow(nanoseconds)
        return overflow ? .never : Deadline(at: sum)
    }

    public static func after(milliseconds: UInt64) -> Deadline { after(nanoseconds: milliseconds * 1_000_000) }

    public static func after(seconds: UInt64) -> Deadline { after(nanoseconds: seconds * 1_000_000_000) }

    public var hasPassed: Bool { self != .never && Clock.monotonicNanoseconds >= nanoseconds }

    /// What is left, in nanoseconds; `nil` for never.
    public var remainingNanoseconds: UInt64? {
        guard self != .never else { return nil }
        let now = Clock.monotonicNanoseconds
        return now >= nanoseconds ? 0 : nanoseconds - now
    }

    /// For poll(2): rounded up, -1 for never.
    public var pollMilliseconds: CInt {
        guard let left = remainingNanoseconds else { return -1 }
        return CInt(min((left + 999_999) / 1_000_000, UInt64(CInt.max)))
    }

    public static func < (a: Deadline, b: Deadline) -> Bool { a.nanoseconds < b.nanoseconds }
}
