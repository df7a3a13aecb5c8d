import GuestMemory
import GuestPrograms
import Host
import Machine
import TestSupport
import Testing

@testable import Migration

/// What stands behind guest memory at both ends.
private struct Backings: Sendable, Codable, CustomTestStringConvertible {
    let source: String
    let destination: String
    var cpus = 2
    var mebibytes: UInt64 = 128

    var testDescription: String { "\(source) to \(destination), \(cpus) vCPUs" }

    /// Huge pages of a size that both together need.
    func count(_ size: HugePagePool.Size) -> Int {
        [source, destination].filter { $0 == "hugetlb=\(size.rawValue)" }.count
            * Int((mebibytes << 20) / size.byteCount)
    }

    var canBeHad: Bool {
        HugePagePool.Size.allCases.allSatisfy { count($0) == 0 || HugePagePool.has(count($0), of: $0) }
    }

    private func machine(_ backing: String, boot: GuestProgram?) throws -> VirtualMachine {
        try VirtualMachine(
            MachineConfiguration(
                memoryByteCount: mebibytes << 20, cpuCount: cpus, boot: boot.map { .guest($0) },
                backing: RAMBacking(rawValue: backing) ?? .anonymous, isIncoming: boot == nil),
            serial: SerialPort(.none))
    }

    func machines(_ program: String) throws -> (source: Migrator, destination: Migrator) {
        let first = try machine(source, boot: try GuestProgram(parsing: program))
        try first.resume()
        try waitFor("the guest to be ready") { try first.guestStatus().isReady }
        return (Migrator(first), Migrator(try machine(destination, boot: nil)))
    }
}

@Suite("Postcopy between two Godwits, whatever stands behind memory", .serialized)
struct PostcopyBackingTests {
    private static let all = [
        Backings(source: "anonymous", destination: "anonymous"),
        Backings(source: "memfd", destination: "memfd", cpus: 4),
        Backings(source: "hugetlb=2M", destination: "hugetlb=2M"),
        Backings(source: "anonymous", destination: "hugetlb=2M"),
        Backings(source: "hugetlb=2M", destination: "memfd", cpus: 1),
        Backings(source: "anonymous", destination: "hugetlb=1G", mebibytes: 1024),
    ]

    @Test(
        "a running guest is fetched in pages of 4 KiB, is right before and after its memory is huge again, and that is told",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)), arguments: all.filter(\.canBeHad))
    fileprivate func runningGuest(backings: Backings) async {
        await #expect(processExitsWith: .success) { [backings] in
            Child.run(seconds: 120) {
                let pools = HugePagePool.Size.allCases.compactMap { size in
                    backings.count(size) > 0 ? HugePagePool(backings.count(size), of: size) : nil
                }
                defer { withExtendedLifetime(pools) {} }
                let (source, destination) = try backings.machines("dirty,working-set=16M,fill=48M,random,rate=200M")
                for migrator in [source, destination] {
                    try migrator.set([(.postcopyRAM, true), (.postcopyPreempt, true)])
                }
                var parameters = MigrationParameters()
                parameters.maxBandwidthBytesPerSecond = 64 << 20
                parameters.maxPostcopyBandwidthBytesPerSecond = 32 << 20
                parameters.downtimeLimitMilliseconds = 0
                try source.set(parameters)
                try source.migrate(to: try destination.listen())
                try waitFor("a round") { (source.info().ram?.dirtySyncCount ?? 0) > 1 || source.isOver }
                try source.startPostcopy()
                try waitFor("the switch, it is \(source.info().status)") {
                    source.info().status == .postcopyActive || source.isOver
                }
                try destination.claimGuestRuns("with pages missing")
                try source.claimArrival(at: destination, "\(backings): \(destination.info().errorDescription ?? "")")
                try waitFor("the share of huge memory", seconds: 60) { destination.info().hugeShare != nil }
                let info = destination.info()
                let share = info.hugeShare ?? 0
                let isHuge = backings.destination.hasPrefix("hugetlb")
                claim(!isHuge || share == 1, "\(backings): only \(share) is huge")
                claim(backings.destination != "memfd" || share == 0, "\(backings): \(share) is huge")
                try destination.claimGuestRuns("when its memory is huge")
                let histogram = info.pageLatency
                print(
                    "postcopy: \(backings.testDescription): \(histogram?.count ?? 0) pages, p50 "
                        + "\((histogram?.nanoseconds(atMille: 500) ?? 0) / 1000) us, p99 "
                        + "\((histogram?.nanoseconds(atMille: 990) ?? 0) / 1000) us, huge \(share)")
            }
        }
    }
}
