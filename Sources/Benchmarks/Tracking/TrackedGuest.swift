import Accelerator
import CommandLineKit
import GuestMemory
import GuestPrograms
import Host
import Machine
import QMP

/// A machine inside a worker's own process, so that its tracker can be called and timed directly.
final class TrackedGuest {
    let machine: VirtualMachine
    let tracker: any DirtyTracker

    /// - Parameters:
    ///   - arguments: `memory` (bytes), `guest` (as `--guest` takes it), `ring` (entries, 0 for the log).
    init(_ arguments: JSON) throws {
        guard let memory = arguments["memory"]?.integerValue(as: UInt64.self),
            let guest = arguments["guest"]?.stringValue,
            let ring = arguments["ring"]?.integerValue()
        else { throw CommandFailure("the worker needs memory, guest and ring, and got \(arguments)") }
        machine = try VirtualMachine(
            MachineConfiguration(
                memoryByteCount: memory, cpuCount: 1, boot: .guest(try GuestProgram(parsing: guest)),
                dirtyTracking: ring > 0 ? .ring(entryCount: ring) : .log), serial: try SerialPort(.none))
        guard let accelerator = machine.accelerator else { throw CommandFailure("the machine has no accelerator") }
        tracker = accelerator.dirtyTracker(for: .migration)
    }

    /// Starts the guest and waits until it has filled its memory.
    func start() throws {
        try machine.resume()
        let deadline = Deadline.after(seconds: 60)
        while try !machine.guestStatus().isReady {
            guard !deadline.hasPassed else { throw CommandFailure("the guest did not fill its memory within 60 s") }
            Clock.sleep(nanoseconds: 5_000_000)
        }
    }

    /// Lets the guest run until it has walked its working set twice more: then every page of it was written.
    func runTwoPasses() throws {
        let wanted = try machine.guestStatus().passes + 2
        try machine.resume()
        let deadline = Deadline.after(seconds: 60)
        while try machine.guestStatus().passes < wanted {
            guard !deadline.hasPassed else {
                throw CommandFailure("the guest did not walk its working set within 60 s")
            }
            Clock.sleep(nanoseconds: 1_000_000)
        }
        machine.pause()
    }

    /// What a migration does with what it collected: has the pages watched afresh, chunk by chunk, and takes them off the records.
    func send(_ records: [any DirtyPages]) throws {
        let chunk: UInt64 = 1 << 14
        for (block, record) in records.enumerated() {
            var position = PageIndex(0)
            while let run = record.nextRun(from: position, limit: 1) {
                let start = run.lowerBound.value / chunk * chunk
                let pages = PageIndex(start)..<PageIndex(min(start + chunk, record.pageCount))
                try tracker.willSend(pages, of: block, marked: record)
                record.clear(pages)
                position = pages.upperBound
            }
        }
    }
}
