/// How long a dry run looks, and in which intervals: short ones tell of hot pages, long ones of working sets, and all of them together
/// of phases.
public enum ObservationPlan {
    /// A quarter of a second in growing parts.
    private static let turn: [Double] = [0.005, 0.01, 0.02, 0.04, 0.04, 0.06, 0.075]
    public static let turns = 8

    /// Two seconds.
    public static let seconds: [Double] = (0..<turns).flatMap { _ in turn }

    /// What is left of the two seconds for a guest that was expensive so far: each page that is found costs it a fault, and its hot
    /// pages are known after the first turns.
    static let sparing: [Double] = (0..<(turns - firstTurns) * 2).map { _ in 0.125 }
    /// After so many turns it is decided.
    static let firstTurns = 2
    /// More pages than this in the first turns are expensive: as many faults as take a good part of a vCPU's time.
    static let expensivePages: UInt64 = 150_000

    /// The interval after so many others; `nil` at the end.
    static func interval(after count: Int, isExpensive: Bool) -> Double? {
        let first = firstTurns * turn.count
        let plan = isExpensive ? Array(seconds.prefix(first)) + sparing : seconds
        return count < plan.count ? plan[count] : nil
    }

    /// Intervals after which it is decided.
    static let decisiveCount = firstTurns * turn.count
}
