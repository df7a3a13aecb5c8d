/// Tells when a guest writes too much for a migration to get ahead: QEMU's rule, by which `auto-converge` and `dirty-limit` act.
///
/// A period counts when the guest dirtied more than `thresholdPercent` of what was sent in it; two such periods in a row fire. QEMU's periods
/// are the time between two looks at the dirty log that are a second apart at least. Rounds are shorter here, so those are summed
/// up until a period is over.
public struct ConvergenceTrigger: Hashable, Sendable {
    /// `throttle-trigger-threshold`.
    public var thresholdPercent: UInt64
    public var periodNanoseconds: UInt64

    /// What a period came to, in bytes.
    public struct Period: Hashable, Sendable {
        public var dirtyBytes: UInt64 = 0
        public var sentBytes: UInt64 = 0
        var nanoseconds: UInt64 = 0
    }
    private var period = Period()
    private var periodsOver = 0

    public init(thresholdPercent: UInt64 = 50, periodNanoseconds: UInt64) {
        self.thresholdPercent = thresholdPercent
        self.periodNanoseconds = periodNanoseconds
    }

    /// Takes what happened since the last collect. - Returns: the period that fired.
    public mutating func collected(dirtyBytes: UInt64, sentBytes: UInt64, nanoseconds: UInt64) -> Period? {
        period.dirtyBytes &+= dirtyBytes
        period.sentBytes &+= sentBytes
        period.nanoseconds &+= nanoseconds
        guard period.nanoseconds >= periodNanoseconds else { return nil }
        defer { period = Period() }
        guard period.dirtyBytes > threshold(of: period) else {
            periodsOver = 0
            return nil
        }
        periodsOver += 1
        guard periodsOver >= 2 else { return nil }
        periodsOver = 0
        return period
    }

    /// As many bytes may be dirtied in a period like this one.
    func threshold(of period: Period) -> UInt64 {
        UInt64(min(Double(period.sentBytes) * Double(thresholdPercent) / 100, 1e18))
    }
}

/// By how much a guest is slowed down so that its migration converges (QEMU's capability `auto-converge`): a value that is told what each
/// collect found.
public struct AutoConverge: Hashable, Sendable {
    /// QEMU's parameters, in percent.
    public struct Settings: Hashable, Sendable {
        /// `throttle-trigger-threshold`.
        public var triggerThreshold: UInt64 = 50
        /// `cpu-throttle-initial`.
        public var initial: UInt64 = 20
        /// `cpu-throttle-increment`.
        public var increment: UInt64 = 10
        /// `max-cpu-throttle`.
        public var maximum: UInt64 = 99
        /// `cpu-throttle-tailslow`: near the end no more is added than it takes.
        public var isTailSlow = false
        public init() {}
    }

    public var settings: Settings { didSet { trigger.thresholdPercent = settings.triggerThreshold } }
    /// The part of its time in which a vCPU stands still; 0: it is not throttled.
    public private(set) var percentage: UInt64 = 0
    private var trigger: ConvergenceTrigger
    /// Shorter than QEMU's second: rounds are, too.
    static let periodNanoseconds: UInt64 = 250_000_000

    public init(_ settings: Settings = Settings()) {
        self.settings = settings
        trigger = ConvergenceTrigger(
            thresholdPercent: settings.triggerThreshold, periodNanoseconds: Self.periodNanoseconds)
    }

    /// Takes what happened since the last collect. - Returns: the percentage from now on.
    @discardableResult
    public mutating func collected(dirtyBytes: UInt64, sentBytes: UInt64, nanoseconds: UInt64) -> UInt64 {
        if let period = trigger.collected(dirtyBytes: dirtyBytes, sentBytes: sentBytes, nanoseconds: nanoseconds) {
            raise(period)
        }
        return percentage
    }

    private mutating func raise(_ period: ConvergenceTrigger.Period) {
        guard percentage > 0 else {
            percentage = min(settings.initial, settings.maximum)
            return
        }
        var step = settings.increment
        if settings.isTailSlow, percentage < 100 {
            // So much of its present time would let the guest dirty no more than the threshold.
            let left = Double(100 - percentage)
            let share = Double(trigger.threshold(of: period)) / Double(max(period.dirtyBytes, 1))
            step = min(step, UInt64(left * (1 - min(1, share))))
        }
        percentage = max(percentage, min(percentage + step, settings.maximum))
    }
}
