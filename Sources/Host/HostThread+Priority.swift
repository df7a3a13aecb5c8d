import CLinux
import Glibc

extension HostThread {
    /// The calling thread's sleeps end when they should, not up to 50 microseconds later as the kernel likes it (PR_SET_TIMERSLACK).
    public static func sleepExactly() { _ = gw_set_timer_slack(1) }

    /// The calling thread runs before every thread of ordinary priority that wants its processor, from here on (SCHED_FIFO); threads that it
    /// starts do not. For measurements on hosts with more busy threads than processors. - Returns: `false` where the host does not allow it.
    public static func runBeforeOthers() -> Bool {
        var parameters = sched_param()
        parameters.sched_priority = sched_get_priority_min(SCHED_FIFO)
        // SCHED_RESET_ON_FORK, which glibc shows to GNU programs only.
        return unsafe sched_setscheduler(0, SCHED_FIFO | 0x4000_0000, &parameters) == 0
    }

    /// The calling thread does short work that somebody waits for, from here on.
    ///
    /// It gets a processor as soon as it wakes up, and the one on which it was woken, where that becomes free by it: to wake up another
    /// processor takes as long as much of such work. A SCHED_FIFO thread stays where it ran last; but among threads that leave no
    /// processor free only such a one is sure not to wait.
    /// - Parameter busyThreads: how many others may want a processor all the time.
    public static func runUrgently(among busyThreads: Int = 0) {
        if busyThreads >= HostMemory.processorCount, runBeforeOthers() { return }
        // Without a privilege short turns must do.
        if gw_set_turn(0, mostUrgentNiceness, urgentTurnNanoseconds) < 0 {
            _ = gw_set_turn(0, 0, urgentTurnNanoseconds)
        }
    }

    private static let mostUrgentNiceness: Int32 = -20

    /// Undoes `runBeforeOthers`.
    public static func runAmongOthers() {
        var parameters = sched_param()
        _ = unsafe sched_setscheduler(0, SCHED_OTHER, &parameters)
    }

    /// How long the turns of threads are that somebody waits for: the least that Linux takes.
    private static let urgentTurnNanoseconds: UInt64 = 100_000
    /// Of others with short turns: longer than those, or they would not give way to them in between.
    private static let shortTurnNanoseconds: UInt64 = 400_000

    /// An ordinary thread's turns on its processor are short from here on, or as the kernel likes them. When one with short turns wakes up, it
    /// need not wait until the turn of another ends, some milliseconds (Linux 6.12; before, this does nothing).
    /// - Parameter identifier: of a thread of this process, as the kernel knows it.
    public static func takeShortTurns(_ identifier: Int32, _ on: Bool) {
        guard sched_getscheduler(identifier) == SCHED_OTHER else { return }
        let nice = getpriority(oneThread, id_t(identifier))
        _ = gw_set_turn(identifier, nice, on ? shortTurnNanoseconds : 0)
    }

    /// How nice a thread in a hurry is (`setpriority(2)`): it is given its processor at once, and leaves the others a tenth of it.
    private static let hastyNiceness: Int32 = -10
    /// With the kernel's id of a thread: that one alone.
    private static let oneThread = Int32(PRIO_PROCESS.rawValue)

    /// This thread gets a processor before others of ordinary priority when it wants one, until `calm`.
    /// - Returns: what `calm` is to be told; `nil` where the host does not allow it, or it is so already.
    public func hasten() -> Int32? {
        let before = niceness
        guard before > Self.hastyNiceness else { return nil }
        return setpriority(Self.oneThread, id_t(identifier), Self.hastyNiceness) == 0 ? before : nil
    }

    /// Undoes `hasten`, unless somebody has changed it since.
    public func calm(to before: Int32) {
        guard niceness == Self.hastyNiceness else { return }
        _ = setpriority(Self.oneThread, id_t(identifier), before)
    }

    /// From -20 to 19, as the kernel shows it.
    public var niceness: Int32 { getpriority(Self.oneThread, id_t(identifier)) }
}
