import CommandLineKit
import Host
import QMP

/// How exactly a limit to a guest's dirty rate is kept: set over QMP, counted by the guest itself, page by page.
struct DirtyLimitRun {
    let scale: TrackingScale
    let options: BenchmarkOptions
    let progress: BenchmarkProgress

    static let limitsMegabytesPerSecond: [UInt64] = [50, 200, 800]
    /// The unit of `dirty-rate` is QEMU's: 2^20 bytes per second.
    private static let unitBytes = Double(1 << 20)

    /// This VM has no such limits: the promise is not kept, and the rest is worth knowing all the same.
    struct Unavailable: Error, CustomStringConvertible {
        let description: String
    }

    static func name(_ limit: UInt64) -> String { "dirty-limit \(limit) MB/s" }

    /// - Returns: for each limit that is wanted the achieved rates, in the limit's unit.
    /// - Throws: `Unavailable` when the VM refuses to set a limit.
    func measure() throws -> [(limit: UInt64, rates: [Double])] {
        let wanted = Self.limitsMegabytesPerSecond.filter { options.wants(named: Self.name($0)) }
        guard !wanted.isEmpty else { return [] }
        let folder = try PrivateFolder("bench")
        defer { folder.remove() }
        // The working set is larger than what is dirtied between two harvests: each touch is a page that becomes dirty.
        let machine = MeasuredMachine(
            method: .ring65536, memoryMegabytes: scale.memoryMegabytes,
            guest: "dirty,working-set=\(scale.workingSetMegabytes)M,sequential", isDestination: false)
        let vm = try GodwitVM("limited", in: folder.path, machine)
        defer { vm.child.end() }
        try options.waitUntilReady("dirty-limit") { try vm.guest().isReady }
        let results = try wanted.map { limit in
            try progress.step("\(Self.name(limit)) for \(scale.limitSeconds) s")
            return (limit, [try rate(of: vm, limit)])
        }
        try vm.verify()
        return results
    }

    private func rate(of vm: GodwitVM, _ limit: UInt64) throws -> Double {
        let client = try vm.child.client()
        do throws(QMPClientError) {
            try client.execute("set-vcpu-dirty-limit", ["dirty-rate": JSON(limit)])
        } catch { throw Unavailable(description: "limits to the dirty rate were not measured: \(error)") }
        let (start, first) = (Clock.monotonicNanoseconds, try vm.guest().touches)
        let end = Deadline.after(seconds: scale.limitSeconds)
        while !end.hasPassed {
            try options.checkInterruption()
            Clock.sleep(nanoseconds: min(200_000_000, end.remainingNanoseconds ?? 0))
        }
        let (stop, second) = (Clock.monotonicNanoseconds, try vm.guest().touches)
        try vm.child.execute("cancel-vcpu-dirty-limit")
        return Double(second - first) * 4096 / Self.unitBytes / (Double(stop - start) / 1e9)
    }
}
