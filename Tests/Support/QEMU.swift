import Glibc
import Host

/// The real QEMU, as the referee of what we send and receive.
public enum QEMU {
    /// Another one than the installed is named in the environment.
    public static let program =
        unsafe getenv("GODWIT_TEST_QEMU").map { unsafe String(cString: $0) } ?? "qemu-system-x86_64"

    /// As `7.2.22`; `nil` where it is not installed.
    public static let version: String? = {
        guard let bench = try? Workbench(), let child = try? bench.start(command: [program, "--version"]) else {
            return nil
        }
        let outcome = bench.finish(child)
        guard outcome.status == .exited(0) else { return nil }
        // "QEMU emulator version 7.2.22 (Debian ...)"
        let words = outcome.output.split(whereSeparator: { $0 == " " || $0 == "\n" })
        return words.firstIndex(of: "version").map { String(words[words.index(after: $0)]) }
    }()

    private static let generation = version.flatMap { Int($0.prefix { $0 != "." }) } ?? 0

    /// Whether it has the capability mapped-ram: QEMU 9.0 and newer.
    public static let knowsMappedRAM = generation >= 9

    /// Whether what it calls transferred is every byte of the stream, as here; QEMU 7.2 counts records of RAM alone, less the heads of sections.
    public static let countsEveryByte = generation >= 10

    /// Whether it is there; says so once.
    public static let isInstalled: Bool = {
        guard let version else {
            print("conformance: skipped, \(program) is not installed (Debian package qemu-system-x86)")
            return false
        }
        print("conformance: running against QEMU \(version)")
        return true
    }()
}

extension Workbench {
    /// A socket of the folder that QEMU listens on.
    private func socket(_ name: String) -> String { "\(folder)/\(name).sock" }

    /// Starts a QEMU without devices and waits until it takes commands.
    /// - Parameters:
    ///   - machine: `none` is RAM and nothing else.
    ///   - ram: a file of `byteCount` bytes that is its memory.
    public func startQEMU(
        _ name: String, byteCount: UInt64, machine: String = "none", ram: String? = nil, _ options: [String] = []
    ) throws -> VM {
        var arguments = [QEMU.program, "-nodefaults", "-display", "none", "-m", "\(byteCount / 1024)K"]
        if let ram {
            arguments += [
                "-machine", "\(machine),memory-backend=ram", "-object",
                "memory-backend-file,id=ram,share=on,mem-path=\(ram),size=\(byteCount)",
            ]
        } else {
            arguments += ["-machine", machine]
        }
        let path = socket(name)
        arguments += ["-qmp", "unix:\(path),server=on,wait=off"] + options
        // It has no option to end with its parent.
        let child = try start(command: ["setpriv", "--pdeathsig", "KILL"] + arguments)
        return try attach(name, to: child, monitor: path)
    }
}
