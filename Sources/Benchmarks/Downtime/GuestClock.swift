import QMP

/// A guest's clock beside that of this host, which it keeps in step with: so that what the guest saw can be laid beside what its VMM says.
struct GuestClock {
    /// By how many milliseconds it is ahead of the host's; `nil` before any look at it.
    private var ahead: Double?
    private var width = UInt64.max

    /// Takes an answer to `x-query-guest`, and when it was asked for and came, in nanoseconds of the monotonic clock. The guest must be one
    /// that runs and looks at its clock all the time. Of several the one that came soonest counts.
    mutating func look(_ guest: JSON, asked: UInt64, answered: UInt64) {
        guard let kilohertz = guest["tsc-kilohertz"]?.doubleValue, kilohertz > 0,
            let look = SwitchoverGap.lastLook(guest), answered - asked < width
        else { return }
        width = answered - asked
        ahead = Double(look) / kilohertz - (Double(asked) / 2 + Double(answered) / 2) / 1e6
    }

    /// A moment of the guest's clock on the host's monotonic one, both in milliseconds.
    func onHost(_ milliseconds: Double) -> Double? { ahead.map { milliseconds - $0 } }
}
