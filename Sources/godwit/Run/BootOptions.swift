import ArgumentParser
import Glibc
import GuestPrograms
import Host
import Machine

/// What a machine boots: at most one of the three.
struct BootOptions: ParsableArguments {
    @Option(help: ArgumentHelp("Boot a flat image in real mode at 0x7c00.", valueName: "file"))
    var bootSector: String?

    @Option(help: ArgumentHelp("Boot a flat ELF kernel with a PVH note.", valueName: "file"))
    var kernel: String?

    @Option(help: ArgumentHelp("The command line of --kernel.", valueName: "text"))
    var append: String?

    @Option(help: ArgumentHelp("Boot a built-in guest: idle, dirty or probe, with parameters.", valueName: "spec"))
    var guest: String?

    func validate() throws {
        guard [bootSector, kernel, guest].compactMap(\.self).count <= 1 else {
            throw ValidationError("A machine boots one thing: give one of --boot-sector, --kernel and --guest.")
        }
        guard append == nil || kernel != nil else { throw ValidationError("--append needs --kernel.") }
    }

    /// Reads what is to be booted. - Throws: an error that names the file and what is wrong with it.
    func source(memoryByteCount: UInt64) throws -> BootSource? {
        if let guest { return .guest(try GuestProgram(parsing: guest)) }
        if let bootSector {
            let image = try contents(of: bootSector, limit: BootSector.maximumBytes) {
                try BootSector.checkLength($0, file: bootSector)
            }
            return .plan(try BootSector(file: bootSector, image: image).plan)
        }
        if let kernel {
            let contents = try contents(of: kernel, limit: PVHKernel.maximumFileBytes) {
                try PVHKernel.checkLength($0, file: kernel)
            }
            let layout = try RAMLayout(byteCount: memoryByteCount, physicalAddressBits: 46)
            return .plan(
                try PVHKernel(file: kernel, contents: contents, commandLine: append ?? "", ram: layout).plan)
        }
        return nil
    }

    private func contents(
        of path: String, limit: UInt64, checkLength: (UInt64) throws -> Void
    ) throws -> [UInt8] {
        let file = try Descriptor.open(path, O_RDONLY)
        try checkLength(try file.size())
        return try file.readAll(limit: Int(limit))
    }
}
