import Glibc

extension HostThread {
    /// The calling thread runs before every thread of ordinary priority that wants its processor, for good (SCHED_FIFO): for measurements
    /// on hosts with more busy threads than processors. - Returns: `false` where the host does not allow it.
    public static func runBeforeOthers() -> Bool {
        var parameters = sched_param()
        parameters.sched_priority = sched_get_priority_min(SCHED_FIFO)
        return unsafe sched_setscheduler(0, SCHED_FIFO, &parameters) == 0
    }
}
