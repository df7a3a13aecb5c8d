/// How long a dry run looks, and in which intervals: short ones tell of hot pages, long ones of working sets, and all of them together
/// of phases.
public enum ObservationPlan {
    /// A quarter of a second in growing parts.
    private static let turn: [Double] = [0.005, 0.01, 0.02, 0.04, 0.04, 0.06, 0.075]
    public static let turns = 8

    /// Two seconds.
    public static let seconds: [Double] = (0..<turns).flatMap { _ in turn }
}
