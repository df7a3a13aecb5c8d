public import Accelerator
public import GuestMemory
import Host
public import Machine
import Synchronization

/// Measures how fast a guest writes to its memory, and knows who can limit that. One measurement at a time, on a thread of its own
/// (`dirty-rate`); from any thread.
///
/// A sample (`PageSample`) costs the guest nothing and sees no page that was written with what it held; tracking counts exactly, and
/// costs the guest a fault per page.
public final class DirtyRateMeter: Sendable {
    private let memory: GuestMemory
    private let makeTracker: @Sendable () -> (any DirtyTracker)?
    private let findControl: @Sendable () -> (any DirtyRateControl)?
    private let state = Mutex(DirtyRateInfo())

    /// - Parameters:
    ///   - tracker: makes a tracker for the client `measurement`; `nil` on a machine without vCPUs.
    ///   - control: the machine's dirty rings.
    public init(
        memory: GuestMemory, tracker: @escaping @Sendable () -> (any DirtyTracker)?,
        control: @escaping @Sendable () -> (any DirtyRateControl)?
    ) {
        self.memory = memory
        makeTracker = tracker
        findControl = control
    }

    public convenience init(_ machine: VirtualMachine) {
        self.init(
            memory: machine.memory, tracker: { machine.accelerator?.dirtyTracker(for: .measurement) },
            control: { machine.accelerator?.dirtyRateControl })
    }

    /// What tells vCPUs apart. - Throws: `MigrationError` on a machine without dirty rings; it says who asked and what would help.
    public func control(for asker: String) throws(MigrationError) -> any DirtyRateControl {
        guard let control = findControl() else {
            throw MigrationError(
                "\(asker): this machine has no dirty ring, which tells its vCPUs apart; "
                    + "start it with --accel kvm,dirty-ring-size=65536")
        }
        return control
    }

    /// The limits that are set; none on a machine without dirty rings.
    public var limits: [DirtyLimit] { findControl()?.limits ?? [] }

    /// Begins to measure; `info` has the result when the time is over.
    /// - Throws: `MigrationError` while something is being measured, and for a mode that this machine does not have.
    public func start(_ request: DirtyRateRequest) throws(MigrationError) {
        let measure = try means(for: request)
        let before = state.withLock { state -> DirtyRateInfo? in
            guard state.status != .measuring else { return nil }
            let before = state
            state = DirtyRateInfo()
            state.status = .measuring
            state.request = request
            state.startSeconds = Clock.realtimeNanoseconds / 1_000_000_000
            return before
        }
        guard let before else { throw MigrationError("calc-dirty-rate: the dirty rate is already being measured") }
        do {
            _ = try HostThread(name: "dirty-rate") { [self] in
                do {
                    let result = try measure()
                    state.withLock { state in
                        (state.bytesPerSecond, state.bytesPerSecondByCPU) = (result.total, result.byCPU)
                        state.status = .measured
                    }
                } catch {
                    state.withLock { state in
                        state.failure = "calc-dirty-rate: \(error)"
                        state.status = .unstarted
                    }
                }
            }
        } catch {
            state.withLock { $0 = before }
            throw MigrationError("calc-dirty-rate: \(error.description)")
        }
    }

    public func info() -> DirtyRateInfo { state.withLock { $0 } }

    /// Bytes per second.
    private struct Result {
        var total: Double
        var byCPU: [Double]?
    }

    private func means(for request: DirtyRateRequest) throws(MigrationError) -> @Sendable () throws -> Result {
        let memory = memory
        if request.mode == .pageSampling {
            return { Result(total: try PageSample.bytesPerSecond(of: memory, request)) }
        }
        let control = request.mode == .dirtyRing ? try control(for: "calc-dirty-rate") : nil
        guard let tracker = makeTracker() else {
            throw MigrationError(
                "calc-dirty-rate: this machine has no vCPU whose writes could be tracked; use mode page-sampling")
        }
        return {
            let count = TrackedCount(tracker, memory)
            guard let control else {
                return Result(total: try count.bytesPerSecond(over: request.nanoseconds))
            }
            let byCPU = try count.bytesPerSecondByCPU(over: request.nanoseconds, control)
            return Result(total: byCPU.reduce(0, +), byCPU: byCPU)
        }
    }
}
