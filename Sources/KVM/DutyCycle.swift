/// How a throttled vCPU divides its time: runs a little, sleeps a little, so that it stands still for a percentage of it.
///
/// Sleep is owed in proportion to what was run, and what was slept too long counts: late wakes and late kicks even out.
struct DutyCycle: Sendable {
    /// 0: not throttled.
    let percentage: Int
    /// How long it may run, and sleeps then, in nanoseconds.
    let runNanoseconds: Double
    let sleepNanoseconds: Double
    private var owed = 0.0

    /// A run of less is mostly the way in and out.
    private static let shortestRun = 100_000.0
    private static let periods = 4_000_000.0...10_000_000.0
    /// A kick that came very late is not slept off to the end: nobody stands still for longer than this at once, nor saves it up.
    private static let mostOwed = 200_000_000.0

    init(percentage: Int) {
        self.percentage = percentage
        let share = Double(min(max(percentage, 0), 99)) / 100
        let wanted = Self.shortestRun / (1 - share)
        let period = min(max(wanted, Self.periods.lowerBound), Self.periods.upperBound)
        runNanoseconds = period * (1 - share)
        sleepNanoseconds = period * share
    }

    mutating func ran(_ nanoseconds: UInt64) {
        owed = min(owed + Double(nanoseconds) * sleepNanoseconds / runNanoseconds, Self.mostOwed)
    }

    mutating func slept(_ nanoseconds: UInt64) { owed = max(owed - Double(nanoseconds), -Self.mostOwed) }

    /// How long it should sleep now, in nanoseconds; 0: it may run.
    ///
    /// A vCPU that was kicked a little early, or is called out by somebody else when little is owed, runs on.
    var nap: UInt64 { owed >= sleepNanoseconds * 0.9 || isResting ? UInt64(max(owed, 0)) : 0 }

    /// It has begun to sleep and is not even yet: whoever woke it up did so for a look at requests.
    var isResting = false

    /// How long it may run now, in nanoseconds.
    var leftToRun: UInt64 {
        guard percentage > 0 else { return .max }
        return UInt64(max(0, (sleepNanoseconds - owed) * runNanoseconds / sleepNanoseconds))
    }
}
