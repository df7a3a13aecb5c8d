import Host
import Machine
import TestSupport
import Testing
import Transport

@testable import Migration

extension Migrator {
    /// Moves a guest that walks its working set by a stride, before its memory, while what it did not ask for comes slowly.
    /// - Returns: how many pages it asked for.
    fileprivate static func requestsOfWalk(
        _ terms: PostcopyPrefetchTests.Terms, isForeseen: Bool
    ) throws -> UInt64 {
        // A pass takes a second, and all memory three.
        let touched = 32 << 20 / terms.stride
        let source = try Migrator.source(
            "dirty,working-set=32M,fill=48M,stride=\(terms.stride),rate=\(touched)", cpus: terms.cpus)
        let capabilities: [(capability: MigrationCapability, on: Bool)] = [
            (.postcopyRAM, true), (.postcopyPreempt, terms.channels > 0),
        ]
        try source.set(capabilities)
        var parameters = MigrationParameters()
        // Nearly nothing is there when the guest moves.
        parameters.maxBandwidthBytesPerSecond = 4 << 20
        parameters.maxPostcopyBandwidthBytesPerSecond = 16 << 20
        parameters.postcopyChannels = UInt64(max(1, terms.channels))
        parameters.prefetchesPostcopy = isForeseen
        try source.set(parameters)
        let destination = try source.destination()
        try destination.set(capabilities)
        try source.migrate(to: try destination.listen())
        try waitFor("the migration to begin") { source.info().status != .setup }
        try source.startPostcopy()
        try source.claimArrival(at: destination, "\(terms), \(isForeseen)")
        source.shutDown()
        return source.info().ram?.postcopyRequests ?? 0
    }
}

@Suite("Postcopy of a guest that walks by a stride, between two Godwits", .serialized)
struct PostcopyPrefetchTests {
    struct Terms: Sendable, Codable {
        var stride = 16
        var cpus = 1
        /// For requested pages; 0: there is the main one alone.
        var channels = 0
    }

    @Test(
        "a third of the pages or fewer must be asked for if the source follows the stride",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)),
        arguments: [Terms(), Terms(stride: 24, cpus: 2, channels: 2)])
    func requests(terms: Terms) async {
        await #expect(processExitsWith: .success) { [terms] in
            Child.run(seconds: 120) {
                let without = try Migrator.requestsOfWalk(terms, isForeseen: false)
                let with = try Migrator.requestsOfWalk(terms, isForeseen: true)
                claim(without >= 90, "only \(without) pages were asked for without it")
                claim(with * 3 <= without, "\(with) pages were asked for, \(without) without it")
            }
        }
    }
}
