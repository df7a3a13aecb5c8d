import CommandLineKit
import Glibc
import GuestMemory
import GuestPrograms
import Host
import KVM
import QMP

/// A VM with a built-in guest that can be measured and checked, whoever runs it.
protocol MeasuredVM: AnyObject {
    var child: ChildVM { get }
    /// Whether the guest has filled its memory, and the pages it has touched since.
    func guest() throws -> (isReady: Bool, touches: UInt64)
    /// Checks every page of the guest, which stands still meanwhile. - Throws: `CommandFailure` with what is wrong.
    func verify() throws
}

/// What a measured VM is like.
struct MeasuredMachine: Sendable {
    var method: TrackingMethod
    var memoryMegabytes: UInt64
    /// As `--guest` takes it.
    var guest: String
    /// Its memory is taken from the host beforehand: what a first touch costs here (up to 2 ms where an outer host has taken the memory
    /// back) has nothing to do with the method, and would drown the difference.
    var isDestination: Bool
}

/// A `godwit run` of this program.
final class GodwitVM: MeasuredVM {
    let child: ChildVM

    init(_ role: String, in folder: String, _ machine: MeasuredMachine) throws {
        let start =
            machine.isDestination
            ? ["--incoming", "tcp:127.0.0.1:0", "--memory-prealloc"] : ["--guest", machine.guest]
        child = try ChildVM(
            role, in: folder,
            options: [
                "--memory", "\(machine.memoryMegabytes)M", "--serial", "none", "--accel",
                machine.method.godwitAccelerator,
            ] + start)
    }

    func guest() throws -> (isReady: Bool, touches: UInt64) {
        let status = try child.execute("x-query-guest")
        return (status["ready"] == true, status["touches"]?.integerValue(as: UInt64.self) ?? 0)
    }

    func verify() throws {
        let result = try child.execute("x-check-guest", deadline: .after(seconds: 120))
        guard result["verified"] == true else {
            throw CommandFailure("\(child.role) VM: \(result["summary"]?.stringValue ?? "\(result)")")
        }
    }
}

/// A QEMU with the same guest, started from an ELF file by the PVH protocol. Its memory is read by the command pmemsave.
final class QEMUVM: MeasuredVM {
    static let program = "qemu-system-x86_64"
    /// Where the blocks lie that tell a guest's status: parameters, shared block, the page of the first vCPU.
    private static let statusBytes: UInt64 = 0x11000

    /// The end of memory, where the firmware leaves its tables, is not the guest's.
    private static let firmwareBytes: UInt64 = 32 << 20

    let child: ChildVM
    private let folder: String
    private let memoryBytes: UInt64

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
        memoryBytes = machine.memoryMegabytes << 20
        guard let accelerator = machine.method.qemuAccelerator else {
            throw CommandFailure("QEMU has no dirty tracking '\(machine.method.rawValue)'")
        }
        var command = [
            try ThisProgram.path(), "bench-worker", "exec", Self.program, "-nodefaults", "-no-user-config", "-machine",
            "pc", "-accel", accelerator, "-m", "\(machine.memoryMegabytes)M", "-display", "none", "-serial", "null",
            "-no-reboot", "-qmp", "unix:\(ChildVM.socketPath(of: role, in: folder)),server=on,wait=off",
        ]
        if machine.isDestination {
            command += ["-incoming", "tcp:127.0.0.1:0", "-mem-prealloc"]
        } else {
            let file = "\(folder)/guest.elf"
            let guestBytes = memoryBytes - Self.firmwareBytes
            let image = try GuestProgram(parsing: machine.guest).image(
                memoryBytes: guestBytes, lowMemoryBytes: guestBytes, cpus: 1, tscKilohertz: try Self.tscKilohertz())
            try Descriptor.create(file).writeAll(PVHGuestFile.contents(image, stagingAddress: guestBytes))
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
            let status = try unsafe GuestStatus(read: memoryReader(windowBytes: Self.statusBytes))
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
                    let stop = min(memoryBytes, max(start + windowBytes, end))
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
