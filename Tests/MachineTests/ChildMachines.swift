import Accelerator
import Glibc
import GuestMemory
import GuestPrograms
import Host
import Machine
import Synchronization
import TestSupport
import Testing

/// Whether guests in real and 32-bit mode run on the processor itself; where KVM emulates them, it cannot emulate all faults.
let hasHardwareVirtualization: Bool = {
    let text = String(decoding: (try? Descriptor.contents(of: "/proc/cpuinfo")) ?? [], as: UTF8.self)
    let flags = text.split(separator: "\n").first { $0.hasPrefix("flags") }?.split(separator: " ") ?? []
    return flags.contains("vmx") || flags.contains("svm")
}()

extension VirtualMachine {
    /// A machine with a built-in guest, not started.
    static func guest(
        _ program: String, mebibytes: UInt64 = 64, cpus: Int = 1, backing: RAMBacking = .anonymous,
        tracking: DirtyTrackingChoice = .automatic
    ) throws -> VirtualMachine {
        try VirtualMachine(
            MachineConfiguration(
                memoryByteCount: mebibytes << 20, cpuCount: cpus, boot: .guest(try GuestProgram(parsing: program)),
                backing: backing, dirtyTracking: tracking), serial: SerialPort(.none))
    }

    /// A machine that boots `image`, not started.
    static func bootSector(
        _ image: [UInt8], cpus: Int = 1, serial: SerialPort? = nil
    ) throws -> VirtualMachine {
        try VirtualMachine(
            MachineConfiguration(
                memoryByteCount: 2 << 20, cpuCount: cpus,
                boot: .plan(try BootSector(file: "test", image: image).plan)), serial: try serial ?? SerialPort(.none))
    }

    /// A machine like this one which waits for its guest.
    func destination(serial: SerialPort? = nil) throws -> VirtualMachine {
        try VirtualMachine(
            MachineConfiguration(
                memoryByteCount: configuration.memoryByteCount, cpuCount: configuration.cpuCount, isIncoming: true),
            serial: try serial ?? SerialPort(.none))
    }

    func awaitReady(seconds: UInt64 = 20) throws {
        try waitFor("the guest to be ready", seconds: seconds) { try guestStatus().isReady }
    }

    /// Ends the test unless the guest's memory is what the guest wrote.
    func claimVerified(_ when: String) throws {
        let check = try checkGuest()
        claim(check.isVerified, "\(when): \(check)")
    }

    /// Copies every allocated page to `other`; holes stay holes.
    func copyMemory(to other: VirtualMachine) throws {
        for (block, target) in zip(memory.blocks, other.memory.blocks) {
            try block.forEachAllocatedRun { pages in
                let offset = Int(pages.lowerBound.offset.value)
                let count = Int(pages.upperBound.offset.value) - offset
                target.mapping.write(block.mapping.read(at: offset, count: count), at: offset)
            }
        }
    }
}

extension RAMBlock {
    /// Visits the runs of allocated pages, cut to at most 1 MiB.
    func forEachAllocatedRun(_ body: (Range<PageIndex>) throws -> Void) throws {
        for run in try allocatedRuns(in: pages) {
            var page = run.lowerBound
            while page < run.upperBound {
                let end = min(run.upperBound, page.advanced(by: 256))
                try body(page..<end)
                page = end
            }
        }
    }
}

/// What a guest sends on its serial line, as it comes out of a unix socket.
final class SerialLine: Sendable {
    private let descriptor: Descriptor
    private let received = Monitor<[UInt8]>([])

    /// Connects to a serial port that listens at `path`.
    init(path: String) throws {
        let descriptor = try Socket.connect(unix: path)
        self.descriptor = descriptor
        let received = received
        _ = try HostThread(name: "serial line") {
            while let bytes = try? descriptor.read(upTo: 4096), !bytes.isEmpty { received.withLock { $0 += bytes } }
        }
    }

    var text: String { received.withLock { String(decoding: $0, as: UTF8.self) } }

    func send(_ text: String) throws { try descriptor.writeAll(Array(text.utf8)) }
    func close() { Socket.shutdown(descriptor) }

    func awaitText(_ what: String, seconds: UInt64 = 20, _ condition: (String) -> Bool) {
        let found: Void? = received.wait(deadline: .after(seconds: seconds)) {
            condition(String(decoding: $0, as: UTF8.self)) ? () : nil
        }
        claim(found != nil, "waited \(seconds) seconds for \(what); the serial line said \"\(text)\"")
    }
}

/// What the kernel tells of the first vCPU's thread (schedstat, Documentation/scheduler/sched-stats.rst): nanoseconds on a processor, and
/// ready to run without one.
func vcpuSchedule() throws -> (ran: Double, waited: Double) {
    for thread in try FileSystem.names(inFolder: "/proc/self/task") {
        let name = try Descriptor.contents(of: "/proc/self/task/\(thread)/comm", limit: 64)
        guard String(decoding: name, as: UTF8.self).hasPrefix("vcpu0") else { continue }
        let bytes = try Descriptor.contents(of: "/proc/self/task/\(thread)/schedstat", limit: 256)
        let fields = String(decoding: bytes, as: UTF8.self).split(separator: " ")
        guard fields.count > 1, let ran = Double(fields[0]), let waited = Double(fields[1]) else { break }
        return (ran, waited)
    }
    Child.fail("the kernel does not tell when thread vcpu0 ran")
}
