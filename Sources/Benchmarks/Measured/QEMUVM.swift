import CommandLineKit
import Glibc
import GuestMemory
import GuestPrograms
import Host
import KVM
import QMP

/// A QEMU with the same guest, started from an ELF file by the PVH protocol. Its memory is read by the command pmemsave.
final class QEMUVM: MeasuredVM {
    /// The environment may name a newer one than that in PATH.
    static let program: String = {
        // SAFETY: the string is copied before anything could change the environment.
        unsafe getenv("GODWIT_BENCH_QEMU").map { unsafe String(cString: $0) } ?? "qemu-system-x86_64"
    }()

    let child: ChildVM
    private let folder: String
    private let layout: QEMULayout
    /// The blocks that tell a guest's status end here: parameters, shared block, a page for each vCPU.
    private let statusBytes: UInt64

    /// The version, as `7.2.22`; `nil` where QEMU is not installed.
    static func version() -> String? {
        guard let folder = try? PrivateFolder("bench") else { return nil }
        defer { folder.remove() }
        guard let output = try? Descriptor.create("\(folder.path)/version"),
            let process = try? ChildProcess([program, "--version"], output: output, error: output),
            process.wait(deadline: .after(seconds: 10))?.isSuccess == true,
            let bytes = try? Descriptor.contents(of: "\(folder.path)/version", limit: 4096)
        else { return nil }
        let words = String(decoding: bytes, as: UTF8.self).split { $0 == " " || $0 == "\n" }
        return words.firstIndex(of: "version").flatMap { words.dropFirst($0 + 1).first }.map(String.init)
    }

    init(_ role: String, in folder: String, _ machine: MeasuredMachine) throws {
        self.folder = folder
        layout = QEMULayout(memoryBytes: machine.memoryBytes)
        statusBytes = 0x10000 + UInt64(machine.cpuCount) * 0x1000
        guard let accelerator = machine.method.qemuAccelerator else {
            throw CommandFailure("QEMU has no dirty tracking '\(machine.method.rawValue)'")
        }
        var command = [
            try ThisProgram.path(), "bench-worker", "exec", Self.program, "-nodefaults", "-no-user-config",
            "-accel", accelerator, "-m", "\(machine.memoryMegabytes)M", "-smp", "\(machine.cpuCount)", "-display",
            "none",
            "-serial", machine.serialPath.map { "unix:\($0),server=on,wait=off" } ?? "null", "-no-reboot",
            "-qmp", "unix:\(ChildVM.socketPath(of: role, in: folder)),server=on,wait=off",
        ]
        if machine.memoryBytes > HostMemory.byteCount {
            // The kernel would refuse so much private memory at once.
            let backend = "memory-backend-ram,id=ram,size=\(machine.memoryMegabytes)M,reserve=off"
            command += ["-object", backend, "-machine", "pc,memory-backend=ram"]
        } else {
            command += ["-machine", "pc"]
        }
        if machine.isDestination {
            command += ["-incoming", "tcp:127.0.0.1:0"] + (machine.takesMemoryBeforehand ? ["-mem-prealloc"] : [])
        } else {
            let file = "\(folder)/guest.elf"
            let image = try GuestProgram(parsing: machine.guest).image(
                memoryBytes: layout.guestBytes, lowMemoryBytes: layout.guestLowBytes, cpus: machine.cpuCount,
                tscKilohertz: try Self.tscKilohertz())
            try Descriptor.create(file).writeAll(
                PVHGuestFile.contents(image, stagingAddress: layout.guestLowBytes))
            command += ["-kernel", file]
        }
        child = try ChildVM(role, in: folder, command: command)
    }

    /// How fast a guest of KVM sees its time stamp counter run.
    private static func tscKilohertz() throws -> UInt64 {
        try KVMAccelerator(memory: GuestMemory(blocks: [], view: FlatView([])), cpuCount: 1).tscKilohertz
    }

    func guest() throws -> (isReady: Bool, touches: UInt64) {
        do throws(GuestProgramError) {
            let status = try unsafe GuestStatus(read: memoryReader(windowBytes: statusBytes))
            return (status.isReady, status.touches)
        } catch {
            guard case .notAGuest = error else { throw error }
            // The firmware has not come to it yet.
            return (false, 0)
        }
    }

    func verify() throws {
        try child.execute("stop")
        let check = try unsafe GuestChecker(read: memoryReader(windowBytes: 64 << 20)).check()
        guard check.isVerified else { throw CommandFailure("\(child.role) VM (QEMU): \(check)") }
    }

    /// Reads by saving a window of the memory to a file, which is mapped; the next window goes into the same file.
    private func memoryReader(windowBytes: UInt64) -> GuestMemoryReader {
        var window: (start: UInt64, memory: Mapping)?
        return { [self] (address, buffer) throws(GuestProgramError) in
            do {
                let end = address + UInt64(buffer.count)
                if window.map({ address < $0.start || end > $0.start + UInt64($0.memory.byteCount) }) ?? true {
                    window = nil
                    let start = address / windowBytes * windowBytes
                    let stop = min(layout.physicalEnd, max(start + windowBytes, end))
                    guard end <= stop else { throw CommandFailure("there is no such memory") }
                    window = (start, try save(start..<stop))
                }
                guard let window else { return }
                // SAFETY: the window holds the range; both are as long as the buffer.
                unsafe window.memory.withBytes(at: Int(address - window.start), count: buffer.count) {
                    unsafe buffer.copyMemory(from: $0)
                }
            } catch { throw .unreadable(physicalAddress: address, reason: "\(error)") }
        }
    }

    private func save(_ range: Range<UInt64>) throws -> Mapping {
        let path = "\(folder)/\(child.role).memory"
        defer { Descriptor.remove(path) }
        try child.execute(
            "pmemsave",
            ["val": JSON(range.lowerBound), "size": JSON(range.count), "filename": .string(path)],
            deadline: .after(seconds: 60))
        return try Mapping(try Descriptor.open(path, O_RDONLY), byteCount: range.count, readOnly: true)
    }
}

/// Where a PC of QEMU has its memory, and how much of it a built-in guest is told of: the end of what lies below 4 GiB, where the firmware
/// leaves its tables, is not the guest's.
struct QEMULayout: Equatable {
    private static let firmwareBytes: UInt64 = 32 << 20
    /// From this much on, memory behind 3 GiB stands at 4 GiB.
    private static let splitBytes: UInt64 = 0xE000_0000

    let guestBytes: UInt64
    let guestLowBytes: UInt64
    /// Behind the last byte of memory.
    let physicalEnd: UInt64

    init(memoryBytes: UInt64) {
        let low = memoryBytes >= Self.splitBytes ? 3 << 30 : memoryBytes
        guestLowBytes = low - Self.firmwareBytes
        guestBytes = guestLowBytes + (memoryBytes - low)
        physicalEnd = memoryBytes > low ? 4 << 30 + (memoryBytes - low) : memoryBytes
    }
}
