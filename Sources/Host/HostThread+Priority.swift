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

    /// Undoes `runBeforeOthers`.
    public static func runAmongOthers() {
        var parameters = sched_param()
        _ = unsafe sched_setscheduler(0, SCHED_OTHER, &parameters)
    }
}
