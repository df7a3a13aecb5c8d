import QMP

/// A guest's clock beside that of this host, which it keeps in step with: so that what the guest saw can be laid beside what its VMM says.
struct GuestClock {
    /// By how many milliseconds it is ahead of the host's, at least; `nil` before any look at it.
    private var ahead: Double?

    /// Takes an answer to `x-query-guest`, and when it came, in nanoseconds of the monotonic clock. The guest must be one that runs and
    /// looks at its clock all the time: whatever comes late, its look or the answer, lets it seem less ahead; so of several the most counts.
    mutating func look(_ guest: JSON, answered: UInt64) {
        guard let kilohertz = guest["tsc-kilohertz"]?.doubleValue, kilohertz > 0,
            let look = SwitchoverGap.lastLook(guest)
        else { return }
        let ahead = Double(look) / kilohertz - Double(answered) / 1e6
        self.ahead = max(self.ahead ?? ahead, ahead)
    }

    /// A moment of the guest's clock on the host's monotonic one, both in milliseconds.
    func onHost(_ milliseconds: Double) -> Double? { ahead.map { milliseconds - $0 } }
}
