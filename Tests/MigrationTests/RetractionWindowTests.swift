import GuestMemory
import Host
import Machine
import MigrationStream
import TestSupport
import Testing
import Transport

@testable import Migration

/// A Godwit source that means harm says pages, or another move of the guest, before it heard that the one before was taken back. The cores'
/// part is in `ProtocolRetractionWindowTests`; here memory is watched, given up and watched again.
@Suite("postcopy, between RETRACT and RETRACTED", .serialized, .timeLimit(.minutes(10)))
struct RetractionWindowTests {
    private static let pages = PageIndex(0)..<PageIndex(512)
    private static let moved = PageIndex(64)..<PageIndex(192)

    private static func machine(isIncoming: Bool) throws -> VirtualMachine {
        try VirtualMachine(
            MachineConfiguration(kind: .none, memoryByteCount: 16 << 20, isIncoming: isIncoming),
            serial: SerialPort(.none))
    }

    /// A destination that is ready to start the guest, and its source.
    private static func reachReady() throws -> (source: VirtualMachine, destination: Migrator, ScriptedPostcopySource) {
        let source = try machine(isIncoming: false)
        fill(source, with: 0x1000)
        let destination = Migrator(try machine(isIncoming: true))
        try destination.set(.postcopyRAM, true)
        let script = try ScriptedPostcopySource(of: source, to: try destination.listen())
        try script.say { writer in
            writer.header()
            writer.configuration(machine: source.configuration.streamName)
            writer.command(.openReturnPath)
            writer.command(.ping(Wire.godwitPing))
        }
        script.waitToHear(.pong(Wire.godwitPing))
        let blocks = script.blocks
        try script.say { writer in
            writer.command(.begin(MigrationIdentifier(high: 1, low: 2), [.twoPhaseHandover, .retraction, .postcopy]))
            writer.command(.postcopy(.advise(PostcopyAdvice(blockPageSizes: 4096))))
            writer.ramSetup(id: ScriptedPostcopySource.ramID, blocks: blocks, postcopyIsAdvised: true)
        }
        try script.pages([pages])
        try move(script)
        return (source, destination, script)
    }

    private static func fill(_ machine: VirtualMachine, with value: UInt64) {
        for page in pages { machine.memory.blocks[0].mapping.store(value + page.value, at: Int(page.offset.value)) }
    }

    private static func move(_ script: ScriptedPostcopySource) throws {
        let before = readies(script)
        try script.discard([moved])
        try script.send(package: script.package(runState: "paused"))
        try script.say { $0.command(.prepare) }
        wait("the destination is not ready", script) { readies(script) > before }
    }

    private static func wait(_ what: String, _ script: ScriptedPostcopySource, until isTrue: () -> Bool) {
        let deadline = Deadline.after(seconds: 20)
        while !isTrue(), !deadline.hasPassed { Clock.sleep(nanoseconds: 1_000_000) }
        claim(isTrue(), "\(what); it said \(script.messages)")
    }

    private static func readies(_ script: ScriptedPostcopySource) -> Int {
        script.messages.count { if case .ready = $0 { true } else { false } }
    }

    private static func check(_ machine: VirtualMachine, _ value: UInt64) {
        for page in pages {
            let bytes = machine.memory.blocks[0].mapping.read(at: Int(page.offset.value), count: 8)
            let got = bytes.reversed().reduce(0 as UInt64) { $0 << 8 | UInt64($1) }
            claim(got == value + page.value, "page \(page.value) holds \(got), not \(value + page.value)")
        }
    }

    @Test("pages in any number come meanwhile: they are taken or dropped, and the next attempt brings the right ones")
    func pages() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 90) {
                let (source, destination, script) = try Self.reachReady()
                for attempt in 1...5 as ClosedRange<UInt32> {
                    if attempt % 2 == 0 {
                        // Behind a word that is too late.
                        try script.say { $0.command(.commitWithin(attempt: attempt, nanoseconds: 0)) }
                    } else {
                        try script.say { $0.command(.retract(attempt: attempt)) }
                    }
                    for _ in 0..<20 { try script.pages([Self.pages]) }
                    script.waitToHear(.retracted(attempt: attempt))
                    Self.fill(source, with: UInt64(attempt) << 20)
                    try script.pages([Self.pages])
                    try Self.move(script)
                }
                try script.say { $0.command(.commitWithin(attempt: 6, nanoseconds: .max)) }
                Self.wait("the guest does not start", script) {
                    script.messages.contains { if case .started = $0 { true } else { false } }
                }
                try script.pages([Self.moved], final: true)
                try script.end()
                try destination.awaitEnd(.completed, "the last attempt")
                script.waitToHear(.shut(0))
                Self.check(destination.machine, 5 << 20)
            }
        }
    }

    @Test("another move at once ends the migration, and nobody who touches memory waits for a page of it")
    func anotherMove() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 90) {
                for number in 0..<10 {
                    let (_, destination, script) = try Self.reachReady()
                    try script.say { $0.command(.retract(attempt: 1)) }
                    try? script.discard([Self.moved])
                    if let package = try? script.package() { try? script.send(package: package) }
                    try? script.say { $0.command(.prepare) }
                    // RETRACTED may be said before all that comes, which is the next attempt then: that is no harm either.
                    let isTakenBack = { script.messages.contains(.retracted(attempt: 1)) }
                    Self.wait("the destination goes on", script) { isTakenBack() || destination.isOver }
                    script.channel.cancel()
                    if isTakenBack() { continue }
                    claim(destination.info().status == .failed, "at \(number): \(destination.info())")
                    for page in Self.pages {
                        _ = destination.machine.memory.blocks[0].mapping.read(at: Int(page.offset.value), count: 8)
                    }
                }
            }
        }
    }
}
